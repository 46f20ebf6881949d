"""Files of a checkpoint are known for what they are by their headers and names, without loading a weight."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from dense_reward.engines.weight_files import check_files, check_names, check_tokenizer_files, tensors_of
from dense_reward.errors import CheckpointError

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of bytes that are all 0."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + shape[0]
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def layers(count: int, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}layers.{i}.mlp.down_proj.weight": (3,) for i in range(count)}


def test_a_header_gives_names_and_dtypes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": (2,), "b": (3,)})
    assert tensors_of(tmp_path / "model.safetensors") == {"a": "U8", "b": "U8"}


@pytest.mark.parametrize("bytes_left", [0, 1, 7, 8, 20, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, bytes_left: int) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": (2,)})
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*: copy or download it again|so copy or download"):
        check_files(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "vocab.txt", "a.model", "x.safetensors", "t.jinja"])
def test_a_git_lfs_pointer_is_refused_whatever_it_stands_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        check_files(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_tensors(tmp_path / first, {"a": (2,), "b": (2,)})
    write_tensors(tmp_path / second, {"b": (2,)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    with pytest.raises(CheckpointError, match=f"{first} holds b, which .* puts into {second}: the shard is of another"):
        check_files(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "config", "says"),
    [
        (layers(2, "_orig_mod.model."), {}, "torch.compile put '_orig_mod.' into them"),
        (layers(2, "module.model."), {}, "put 'module.' into them"),
        (layers(1), {"num_hidden_layers": 2}, "states 2 layers, but the files hold 1"),
    ],
    ids=["compiled", "data parallel", "too few layers"],
)
def test_names_that_no_model_has_are_refused_without_loading(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, int], says: str
) -> None:
    write_tensors(tmp_path / "model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        check_names(tmp_path)


def test_names_are_not_asked_for_where_there_are_none(tmp_path: Path) -> None:
    """A remote engine's weights can be on the server only; more layers than stated can be for other predictions."""
    check_names(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    check_names(tmp_path)
    write_tensors(tmp_path / "model.safetensors", layers(3))
    check_names(tmp_path)


def test_a_folder_with_any_vocabulary_has_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        check_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    check_tokenizer_files(tmp_path)
