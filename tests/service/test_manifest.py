"""A manifest: which ones are refused, and that every change of a file that can change scores is detected."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dense_reward.errors import CheckpointError
from dense_reward.folders import folder_name
from dense_reward.hashed_files import MANIFEST_NAME, hash_files
from dense_reward.manifest import (
    Manifest,
    adapter_base_folder,
    check_pair,
    files_folder,
    load_manifest,
    tokenizer_sha256,
    verify_files,
)
from hypothesis import given, settings
from hypothesis import strategies as st

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


def manifest(**changes: object) -> Manifest:
    facts: dict[str, object] = {
        "role": "sft",
        "run_id": "run",
        "optimiser_step": 20,
        "renderer": "plain",
        "end_of_turn_id": 2,
        "vocabulary": 100,
        "tokenizer_sha256": "t",
        "template_sha256": "p",
        "dtype": "float32",
        "files": {},
        "probe": [{"prompt_ids": [1], "responses": [{"ids": [2, 3], "logprobs": [-0.5, -1.25]}]}],
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return Manifest.model_validate(facts | changes)


def reference(**changes: object) -> Manifest:
    probe = [{"prompt_ids": [1], "responses": [{"ids": [2, 3], "logprobs": [-0.75, -2.5]}]}]
    other = {"files": {WEIGHTS: "earlier"}, "probe": probe}
    return manifest(**({"role": "reference", "optimiser_step": 10} | other | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with made-up files and their manifest."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 40)
    (folder / TOKENIZER).write_text('{"model": {}}')
    (folder / "config.json").write_text("{}")
    write_manifest(folder, manifest(files=hash_files(folder)))
    return folder


def write_manifest(folder: Path, made: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(made.model_dump_json(indent=2))


def verify(folder: Path) -> None:
    verify_files(folder, load_manifest(folder))


def test_a_manifest_comes_back_as_it_was_written(checkpoint: Path) -> None:
    assert load_manifest(checkpoint) == manifest(files=hash_files(checkpoint))
    verify(checkpoint)


def test_a_folder_without_a_manifest_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has no manifest.json: .*dense-reward adopt {tmp_path}"):
        load_manifest(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        load_manifest(tmp_path / "nowhere")


def test_a_folder_that_is_not_there_comes_with_those_that_are(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"; {checkpoint.parent} has the checkpoints {checkpoint.name}"):
        load_manifest(checkpoint.parent / "reference")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(CheckpointError, match=rf"; {tmp_path}/mounted is empty$"):
        load_manifest(tmp_path / "mounted" / "sft")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_is_not_called_missing(checkpoint: Path) -> None:
    checkpoint.parent.chmod(0o600)
    try:
        with pytest.raises(CheckpointError, match="allow this user to enter the folders above it"):
            load_manifest(checkpoint)
    finally:
        checkpoint.parent.chmod(0o700)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_manifest_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    content = manifest().model_dump_json().encode()
    (folder / MANIFEST_NAME).write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointError, match="is not a manifest"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(manifest_version=2), r"another version of manifests \(2, this program reads 1\): install"),
        (lambda m: m.update(role="teacher"), "role: Input should be 'sft'"),
        (lambda m: m.pop("vocabulary"), "vocabulary: Field required"),
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m["probe"][0]["responses"][0]["logprobs"].pop(), "2 ids, but 1 log-probs"),
        (lambda m: m["probe"][0]["responses"][0]["ids"].append("x"), r"probe.0.responses.0.ids.2: Input should be"),
    ],
)
def test_a_wrong_field_is_named(checkpoint: Path, change: Callable[[dict[str, object]], object], place: str) -> None:
    content = json.loads((checkpoint / MANIFEST_NAME).read_text())
    change(content)
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=place):
        load_manifest(checkpoint)


def test_a_manifest_that_is_not_text_is_refused(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not a manifest"):
        load_manifest(checkpoint)


@settings(deadline=None)  # it hashes files, which a busy machine does slowly
@given(name=st.sampled_from([WEIGHTS, TOKENIZER, "config.json"]), at=st.integers(0), bit=st.integers(0, 7))
def test_one_flipped_bit_in_any_file_is_seen(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    for file in (WEIGHTS, TOKENIZER, "config.json"):
        (folder / file).write_bytes(bytes(range(100)))
    write_manifest(folder, manifest(files=hash_files(folder)))
    content = bytearray((folder / name).read_bytes())
    content[at % len(content)] ^= 1 << bit
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} does not match its hash in manifest.json: copy"):
        verify(folder)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / TOKENIZER).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing: copy the checkpoint again"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "adapter_model.safetensors"])
def test_added_weights_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("")
    with pytest.raises(CheckpointError, match=rf"{name} is not in manifest.json: remove it"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["README.md", "optimizer.pt", "eval_results.json"])
def test_files_that_change_nothing_may_come_and_go(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{}")
    verify(checkpoint)


def test_a_side_manifest_speaks_of_the_files_where_they_lie(checkpoint: Path, tmp_path: Path) -> None:
    side = tmp_path / "side"
    side.mkdir()
    write_manifest(side, manifest(source=str(checkpoint), files=hash_files(checkpoint)))
    assert files_folder(side, load_manifest(side)) == checkpoint
    verify(side)
    (checkpoint / WEIGHTS).write_bytes(b"other")
    with pytest.raises(CheckpointError, match=f"{checkpoint / WEIGHTS} does not match"):
        verify(side)
    write_manifest(side, manifest(source=str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match="gone: the checkpoint's files are missing"):
        verify(side)


def test_the_base_model_of_an_adapter_is_verified_too(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_manifest(adapter, manifest(adapter_base=str(checkpoint), adapter_base_files=hash_files(checkpoint)))
    verify(adapter)
    (checkpoint / WEIGHTS).write_bytes(b"other")
    with pytest.raises(CheckpointError, match=f"{checkpoint / WEIGHTS} does not match"):
        verify(adapter)


def test_two_checkpoints_of_one_run_in_order_are_related() -> None:
    assert check_pair(manifest(), reference(), allow_unrelated=False)


@pytest.mark.parametrize("allow_unrelated", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "other"}, "different tokenizers: their ids mean different things"),
        ({"vocabulary": 101}, "different vocabularies: 100 and 101 output rows"),
        ({"template_sha256": "other"}, "different chat templates: adopt both with --renderer plain"),
        ({"end_of_turn_id": 3}, r"different ends of turn .* with the --end-of-turn of the other"),
        ({"end_of_turn_id": None}, r"different ends of turn \(.* and none\)"),
    ],
)
def test_what_can_never_make_a_pair_is_refused(changes: dict[str, object], message: str, allow_unrelated: bool) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_pair(manifest(), reference(**changes), allow_unrelated=allow_unrelated)


@pytest.mark.parametrize(
    ("sft", "other", "message"),
    [
        (manifest(), reference(run_id="b"), r"different runs \(run and b\)"),
        (manifest(role="policy"), reference(), "given as sft is a policy"),
        (manifest(), reference(role="sft"), "the one given as reference a sft"),
        (manifest(optimiser_step=10), reference(), r"\(step 10\) is not later than the reference \(step 10\)"),
        (manifest(optimiser_step=9), reference(), r"\(step 9\) is not later"),
    ],
)
def test_an_unlikely_pair_is_served_only_where_that_is_asked_for(sft: Manifest, other: Manifest, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{message}.*: pass --allow-unrelated"):
        check_pair(sft, other, allow_unrelated=False)
    assert not check_pair(sft, other, allow_unrelated=True)


@pytest.mark.parametrize("allow_unrelated", [False, True])
@pytest.mark.parametrize("run_id", ["run", "another"])
def test_exchanged_checkpoints_are_told_to_be_swapped(allow_unrelated: bool, run_id: str) -> None:
    """Their rewards would have the wrong sign."""
    with pytest.raises(CheckpointError, match=r"sft is a reference, .* an sft: swap") as caught:
        check_pair(reference(), manifest(run_id=run_id), allow_unrelated=allow_unrelated)
    assert "--allow-unrelated" not in str(caught.value)


FILES = {WEIGHTS: "same", "config.json": "c"}


@pytest.mark.parametrize("allow_unrelated", [False, True])
@pytest.mark.parametrize(
    ("sft", "other"),
    [
        (manifest(files=FILES), reference(files=FILES)),
        (manifest(files=FILES | {"README.txt": "1"}), reference(files=FILES | {"README.txt": "2"})),
        (manifest(files={"a.safetensors": "1"}), reference(probe=manifest().probe)),
    ],
    ids=["equal files", "equal weights and configuration", "equal log-probs of other files"],
)
def test_a_model_paired_with_itself_is_refused(sft: Manifest, other: Manifest, allow_unrelated: bool) -> None:
    with pytest.raises(CheckpointError, match="every reward would be 0: name an earlier checkpoint"):
        check_pair(sft, other, allow_unrelated=allow_unrelated)


def test_adapters_with_equal_weights_and_other_scaling_are_a_pair() -> None:
    adapter = {"adapter_model.safetensors": "same", "adapter_config.json": "alpha 16"}
    other = adapter | {"adapter_config.json": "alpha 32"}
    assert check_pair(manifest(files=adapter), reference(files=other), allow_unrelated=False)


@pytest.mark.parametrize("moved", ["both", "base", "adapter"])
def test_an_adapter_finds_its_base_after_a_move(checkpoint: Path, tmp_path: Path, moved: str) -> None:
    home = tmp_path / "home"
    adapter, base = home / "run" / "sft", home / "base"
    adapter.mkdir(parents=True)
    checkpoint.rename(base)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    name = folder_name(adapter, base)
    assert name == "../../base"
    files = hash_files(adapter)
    write_manifest(adapter, manifest(files=files, adapter_base=name, adapter_base_files=hash_files(base)))
    if moved == "both":
        home = home.rename(tmp_path / "elsewhere")
        adapter, base = home / "run" / "sft", home / "base"
    elif moved == "adapter":  # adapter_config.json names the base by an absolute path
        adapter = adapter.rename(tmp_path / "sft")
    else:
        base = base.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=r"its base model \.\./\.\./base is not there: move or download it"):
            verify(adapter)
        return
    assert adapter_base_folder(adapter, load_manifest(adapter)) == base
    verify(adapter)


def test_a_base_far_away_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d" / "e"
    assert folder_name(deep, tmp_path / "base") == str((tmp_path / "base").resolve())
    assert folder_name(Path("/checkpoints/sft"), Path("/models/base")) == "/models/base"
    assert folder_name(tmp_path, tmp_path / "base") == "./base"


def test_a_base_in_a_hubs_cache_far_away_is_named_by_its_id_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d" / "e"
    snapshot = tmp_path / "models--organisation--base" / "snapshots" / ("0" * 39 + "1")
    snapshot.mkdir(parents=True)
    assert folder_name(deep, snapshot) == str(snapshot), "a cache that is not this machine's"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = folder_name(deep, snapshot)
    assert name == f"organisation/base@{'0' * 39}1"
    assert adapter_base_folder(tmp_path, manifest(adapter_base=name)) == snapshot
    with pytest.raises(CheckpointError, match="its base model organisation/other@main is not there"):
        adapter_base_folder(tmp_path, manifest(adapter_base="organisation/other@main"))
    assert files_folder(tmp_path, manifest(source=name)) == snapshot
    with pytest.raises(CheckpointError, match="hf download organisation/other --revision main"):
        files_folder(tmp_path, manifest(source="organisation/other@main"))


def test_a_hubs_cache_near_the_manifest_needs_no_variable_and_another_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chart puts checkpoints and cache on one volume, and the service does not know that cache."""
    revision = "0" * 39 + "1"
    snapshot = tmp_path / "volume" / "hub" / "models--organisation--base" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    side = tmp_path / "volume" / "sft"
    made = manifest(source=folder_name(side, snapshot))
    assert made.source == f"../hub/models--organisation--base/snapshots/{revision}"
    assert files_folder(side, made) == snapshot
    (tmp_path / "volume" / "hub").rename(tmp_path / "other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    moved = tmp_path / "other" / "models--organisation--base" / "snapshots" / revision
    assert files_folder(side, made) == moved
    assert files_folder(side, manifest(source=str(snapshot))) == moved, "a manifest of an earlier version"


def test_a_side_folder_and_its_source_can_be_moved_together(checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    side = home / "adopted" / "sft"
    side.mkdir(parents=True)
    files = checkpoint.rename(home / "model")
    made = manifest(source=folder_name(side, files), files=hash_files(files))
    assert made.source == "../../model"
    write_manifest(side, made)
    moved = home.rename(tmp_path / "moved")
    assert files_folder(moved / "adopted" / "sft", made) == moved / "model"
    verify(moved / "adopted" / "sft")


def test_the_hash_of_all_weights_depends_on_weights_alone() -> None:
    of = manifest(files={"a.safetensors": "1", "tokenizer.json": "2"})
    assert of.weights_sha256 == manifest(files={"tokenizer.json": "3", "a.safetensors": "1"}).weights_sha256
    assert of.weights_sha256 != manifest(files={"a.safetensors": "2"}).weights_sha256
    assert of.weights_sha256 != manifest(files=of.files, adapter_base_files={"b": "1"}).weights_sha256


def test_the_hash_of_all_content_depends_on_every_file() -> None:
    of = manifest(files={"a.safetensors": "1", "config.json": "2"})
    assert of.content_sha256 == manifest(files={"config.json": "2", "a.safetensors": "1"}).content_sha256
    assert of.content_sha256 != manifest(files={"a.safetensors": "1", "config.json": "3"}).content_sha256
    assert of.content_sha256 != manifest(files=of.files, adapter_base_files={"b": "1"}).content_sha256


def test_the_fraction_of_a_run_is_known_where_its_samples_are() -> None:
    assert manifest(samples_processed=30, samples_total=60).sample_fraction == 0.5
    assert manifest(samples_processed=30).sample_fraction is None


def test_a_tokenizers_hash_is_that_of_what_its_ids_mean() -> None:
    vocabulary = {"a": 0, "b": 1, "é": 2}
    fixed = tokenizer_sha256(vocabulary, [0, 1])
    assert fixed == tokenizer_sha256(dict(reversed(vocabulary.items())), (0, 1))
    assert fixed.startswith("258cb32d000d569a"), "clients compute this hash too: it must never change"
    assert fixed != tokenizer_sha256(vocabulary | {"c": 3}, [0, 1])
    assert fixed != tokenizer_sha256({"a": 1, "b": 0, "é": 2}, [0, 1])
    assert fixed != tokenizer_sha256(vocabulary, [1, 0])
