"""Checks that the files of a checkpoint are complete and what their names say, before anything is loaded.

Reads only headers and small files, so that any engine can call it, also one that does not load the weights itself.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import refuse_run_folder, scored_files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric",
}
"""Parts that a wrapper of a model puts into the names of its weights, and the wrapper."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
_JSON_FILES = (
    *(CONFIG, INDEX, ADAPTER_CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    "added_tokens.json",  # not tokenizer.json: it is large, and check_tokenizer_files reads it where it is used
)
_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
LARGEST_ID, MOST_ADDED_TOKENS, MOST_PIECES = 1 << 24, 1 << 16, 1 << 10
"""Of a tokenizer: its largest id, its added tokens, and what its post-processor puts around a text."""
_LARGEST_HEADER_BYTES = 16_000_000  # a hundred thousand weights, many times those of any file; parsed in one go
_LARGEST_JSON_BYTES = 4_000_000
_LARGE_JSON = ("tokenizer.json", "vocab.json", INDEX)
"""Files with an entry for each token or weight, whose size hashed_files bounds."""

Tensors = Mapping[str, str]
"""Name -> dtype, as safetensors writes it: F32, BF16, I64, ..."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in the header of a file: its dtype, shape, and the place of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What the headers of a folder's weights say: how many tensors, their numbers and bytes, the largest dimension."""

    tensors: int
    numbers: int
    bytes: int
    largest: int


def check_files(folder: Path) -> None:
    """Verify that no file of a folder is unreadable, a git-lfs pointer, broken JSON or an incomplete safetensors file.

    Also verifies that the shards are those of the index. Does not verify that any file exists. Raises CheckpointError,
    which names the file and the cure.
    """
    for path in scored_files(folder):
        _refuse_pointer(path)
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _check_names_no_file(folder / name, read_json(folder / name))
    headers = {path.name: tensors_of(path) for path in sorted(folder.glob("*.safetensors"))}
    _check_shards(folder, headers)


def check_weights_exist(files: Path) -> None:
    """Raises CheckpointError, which says what is there instead, if a folder holds no safetensors file."""
    if any(files.glob("*.safetensors")):
        return
    inner = sorted(path.name for path in files.glob("checkpoint-*") if any(path.glob("*.safetensors")))
    if inner:
        raise CheckpointError(f"{files} has no weights of its own: name one of {', '.join(inner)} in it")
    refuse_run_folder(files)
    other = sorted(
        path.name for suffix in ("bin", "pt", "pth", "gguf", "msgpack", "h5") for path in files.glob(f"*.{suffix}")
    )
    found = f"only {', '.join(other)}" if other else "no weights at all"
    raise CheckpointError(
        f"{files} has {found}: only safetensors are loaded, because other formats can run code or lose precision. "
        'Convert them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{files}', dtype='auto').save_pretrained('OUT')\", and copy the tokenizer's files to OUT"
    )


def weights_of(folder: Path) -> Tensors:
    """The tensors in the files that a model is loaded from."""
    return {name: dtype for path in model_files(folder) for name, dtype in tensors_of(path).items()}


def stored_in(paths: Iterable[Path]) -> Stored:
    """Of the headers of safetensors files. Raises CheckpointError for a file that is none."""
    entries = [entry for path in paths for entry in _header(path).values()]
    return Stored(
        tensors=len(entries),
        numbers=sum(math.prod(entry.shape) for entry in entries),
        bytes=sum(entry.end - entry.start for entry in entries),
        largest=max((size for entry in entries for size in entry.shape), default=0),
    )


def model_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: the shards of the index, or the one file. No adapter's."""
    index = folder / INDEX
    listed = read_json(index).get("weight_map") if index.is_file() else None
    files = sorted({*map(str, listed.values())}) if isinstance(listed, dict) else [WEIGHTS]
    return [folder / name for name in files if (folder / name).is_file()]


def check_tokenizer_files(folder: Path) -> None:
    """Raises CheckpointError if the folder holds no tokenizer, or one that git-lfs has not downloaded or is broken."""
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no tokenizer (neither tokenizer.json nor another vocabulary): copy the tokenizer's files "
            "of its base model into the folder"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            _refuse_pointer(folder / name)
            content = read_json(folder / name)
            _check_names_no_file(folder / name, content)
            _check_ids(folder / name, content)


def check_names(folder: Path) -> None:
    """Compare the names of the weights with config.json, for an engine that does not load the weights.

    Does nothing if weights or config.json are missing: they can be where the model is served. Raises CheckpointError.
    """
    config_file = folder / CONFIG
    names = {
        name
        for path in folder.glob("model*.safetensors")
        if _MODEL_WEIGHTS.fullmatch(path.name)
        for name in tensors_of(path)
    }
    adapter = folder / ADAPTER_WEIGHTS
    names |= set(tensors_of(adapter)) if adapter.is_file() else set()
    if cure := wrapper_cure(names):
        raise CheckpointError(f"{folder}: its weights have names that no model has, such as {min(names)!r}: {cure}")
    if not names or adapter.is_file() or not config_file.is_file():
        return
    config = read_json(config_file)
    layers = config.get("num_hidden_layers")
    found = len({match[2] for name in names if (match := LAYER.search(name))})
    if isinstance(layers, int) and 0 < found < layers:
        raise CheckpointError(
            f"{folder}: config.json states {layers} layers, but the files hold {found}: copy both from one checkpoint"
        )


LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|block)\.(\d+)\.")
"""The place of a layer's number in the names of its weights."""


def wrapper_cure(names: set[str]) -> str | None:
    """The cure if the names contain a wrapper's part, such as torch.compile's `_orig_mod.`; else None."""
    for part, wrapper in WRAPPERS.items():
        if any(name.startswith(part) or f".{part}" in name for name in names):
            return f"{wrapper} put {part!r} into them: strip it from the names, or save the unwrapped model"
    return None


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises CheckpointError if the file is anything else, or far too large."""
    if path.name not in _LARGE_JSON and path.is_file() and path.stat().st_size > _LARGEST_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, more than {_LARGEST_JSON_BYTES}: copy it again from its source"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy it again from its source") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy it again from its source")
    return content


def tensors_of(path: Path) -> Tensors:
    """The tensors in the header of a safetensors file. Raises CheckpointError if it is incomplete or another file."""
    return {name: entry.dtype for name, entry in _header(path).items()}


def _header(path: Path) -> dict[str, _Entry]:
    """Name -> dtype, shape and place of each tensor. Raises CheckpointError if they are not those of a whole file."""
    _refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _LARGEST_HEADER_BYTES):
            kind = "is empty" if size == 0 else "is cut off, or is not a safetensors file"
            raise CheckpointError(f"{path} {kind} ({size} bytes): copy or download it again")
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            entries = {
                name: _Entry(str(each["dtype"]), tuple(map(int, each["shape"])), *map(int, each["data_offsets"]))
                for name, each in header.items()
            }
            end = max((entry.end for entry in entries.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} is no safetensors file (its header is broken): copy it again") from error
    if size != 8 + header_bytes + end:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header describes {8 + header_bytes + end}: it is cut off or "
            "overwritten, so copy or download it again"
        )
    return entries


def _check_names_no_file(path: Path, content: Mapping[str, object]) -> None:
    """Raises CheckpointError if a file says that another one is to be read, which no hash would cover."""
    folder = path.parent
    if "transformers_weights" in content:
        raise CheckpointError(
            f"{path} names files of weights (transformers_weights): remove it, and name them {WEIGHTS} or in {INDEX}"
        )
    versions = content.get("fast_tokenizer_files")
    named = [*(versions if isinstance(versions, list) else [])]
    named += [] if (folder / "tokenizer.json").is_file() else [v for k, v in content.items() if k.endswith("_file")]
    for name in named:
        if isinstance(name, str) and Path(name).name != name:
            raise CheckpointError(f"{path} names the file {name} of another folder: remove it, and copy that file here")


def _check_ids(path: Path, content: Mapping[str, object]) -> None:
    """Raises CheckpointError for ids, added tokens or pieces around a text beyond those of any tokenizer.

    Tables of that many ids would fill the memory, and libraries add tokens one by one while all other threads wait.
    """
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    largest = max((one for one in ids if isinstance(one, int)), default=0)
    if largest > LARGEST_ID:
        raise CheckpointError(f"{path} has the id {largest}, beyond any vocabulary: copy it again from its source")
    processor = content.get("post_processor")
    pieces = processor.get("single") if isinstance(processor, dict) else None
    for what, listed, most in (
        ("added tokens", content.get("added_tokens"), MOST_ADDED_TOKENS),
        ("pieces around a text (post_processor)", pieces, MOST_PIECES),
    ):
        if isinstance(listed, list) and len(listed) > most:
            raise CheckpointError(f"{path} has {len(listed)} {what}, more than {most}: copy it again from its source")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository, or download it "
            "again with `hf download`"
        )


def _check_shards(folder: Path, headers: Mapping[str, Tensors]) -> None:
    shards = sorted(name for name in headers if _MODEL_WEIGHTS.fullmatch(name) and name != WEIGHTS)
    if not (folder / INDEX).is_file():
        if shards and WEIGHTS not in headers:
            raise CheckpointError(
                f"{folder} holds shards ({shards[0]}), but no {INDEX}: copy it from where the shards come from"
            )
        if shards:
            raise CheckpointError(
                f"{folder} holds weights twice, {WEIGHTS} and shards ({shards[0]}): remove those of another checkpoint"
            )
        return
    _check_index(folder, headers, shards)


def _check_index(folder: Path, headers: Mapping[str, Tensors], shards: list[str]) -> None:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX} has no weight_map: copy it again from its source")
    files = Counter(map(str, listed.values()))
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder / INDEX} names the file {name} of another folder: move the shard next to the index"
            )
        if name not in headers:
            raise CheckpointError(f"{folder / name} is missing, but {INDEX} names it: copy or download the shard")
    for name in [*shards, *([WEIGHTS] if WEIGHTS in headers else [])]:
        if name not in files:
            raise CheckpointError(
                f"{folder / name} is not in {INDEX}: remove the one of them that belongs to another checkpoint"
            )
    for place in _misplaced(listed, headers):
        raise CheckpointError(
            f"{folder}: {place}: the shard is of another model or was split differently, so copy all shards and the "
            "index again"
        )


def _misplaced(listed: Mapping[str, str], headers: Mapping[str, Tensors]) -> Iterator[str]:
    """Tensors that are missing from the shard that the index names, or that are in another shard."""
    for tensor, name in listed.items():
        if tensor not in headers[name]:
            yield f"{INDEX} puts {tensor} into {name}, which does not hold it"
    for name in {*listed.values()}:
        for tensor in headers[name]:
            if listed.get(tensor, name) != name:
                yield f"{name} holds {tensor}, which {INDEX} puts into {listed[tensor]}"
