"""The files that a checkpoint's scores depend on, and their hashes. Whatever is read of a checkpoint is among them."""

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from dense_reward.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
HASHED_SUFFIXES = (
    *(".safetensors", ".json", ".jinja", ".model", ".txt"),
    *(".tiktoken", ".spm", ".codes", ".tokenizer"),  # vocabularies of some tokenizers
)
TEMPLATES_FOLDER = "additional_chat_templates"
"""The only folder inside a checkpoint's that transformers reads."""
UNREAD = re.compile(r"(trainer_state|(\w+_)?results)\.json|(README|LICENSE|NOTICE|requirements)\.txt")
"""Files beside a checkpoint that no library reads: they may come and go."""
MAX_FILES = 2_000
"""Files of a folder, above which it is not read: it is no checkpoint's, and listing it takes time from others."""
MAX_TEXT_BYTES = 64_000_000
"""Of a vocabulary; the largest have half of this. Libraries parse it while all other threads wait."""
MAX_TEMPLATE_BYTES = 1_000_000
SPARSE_BYTES = 100_000_000
"""Size from which a file must be on the disk: to hash a hole of any size takes no space, but time."""
SMALL_BYTES = 16_000_000
"""Of all files together: one thread hashes them in some milliseconds, and several would take turns with requests."""

Stamp = tuple[int, int, int]
Stamps = Mapping[Path, Stamp]
"""File -> its inode, size and time of change, which differ once it was written to or replaced."""


def checkpoints_of_run(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run of dense-reward-train; none if it is no such folder."""
    return sorted(path.parent for path in (folder / "checkpoints").glob(f"*/{MANIFEST_NAME}"))


def refuse_run_folder(folder: Path) -> None:
    """Raises CheckpointError, naming the checkpoints, if a run's folder is given where one of them is meant."""
    found = checkpoints_of_run(folder)
    if found and not (folder / MANIFEST_NAME).exists():
        names = ", ".join(str(path) for path in found)
        raise CheckpointError(f"{folder} is the folder of a run, not a checkpoint: name one of {names}")


def why_no_folder(folder: Path) -> str:
    """What to say of a checkpoint folder that is not there, or that this user may not enter: what is in its place."""
    said = f"{folder}: no such checkpoint folder"
    try:
        folder.stat()
    except PermissionError as error:
        return (
            f"{folder} cannot be reached ({error.strerror}): allow this user to enter the folders above it (chmod a+x)"
        )
    except (OSError, ValueError):  # no such path, one that is too long, or one with a zero byte
        pass
    try:
        beside = sorted(folder.parent.iterdir())
        names = [path.name for path in beside if (path / MANIFEST_NAME).is_file()]
    except (OSError, ValueError):
        return said
    if names:
        return f"{said}; {folder.parent} has the checkpoints {', '.join(names[:8])}"
    return said if beside else f"{said}; {folder.parent} is empty"


def scored_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint that can change its scores, in order; all are ordinary files that can be read.

    Raises CheckpointError, with the cure, for a link to nothing, a folder or a pipe under such a name, for files that
    this user may not read (opening them later would fail, or wait for ever), and for one far too large.
    """
    paths = [path for path in _entries(folder) if path.suffix in HASHED_SUFFIXES and path.name != MANIFEST_NAME]
    templates = folder / TEMPLATES_FOLDER
    if templates.is_dir():
        paths += [path for path in _entries(templates) if path.suffix == ".jinja"]
    for path in paths:
        if not path.is_file():
            links = "no ordinary file" if path.exists() else "a link to a file that is not there"
            kind = "a folder" if path.is_dir() else links
            raise CheckpointError(
                f"{path} has the name of a checkpoint's file, but is {kind}: copy the file itself there, or remove it"
            )
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path} cannot be read (Permission denied): allow this user to read it (chmod a+r)")
        if path.stat().st_size > SPARSE_BYTES and 512 * path.stat().st_blocks < path.stat().st_size / 8:
            raise CheckpointError(f"{path} is mostly a hole, as an unfinished download leaves it: copy it again")
        most = MAX_TEMPLATE_BYTES if path.suffix == ".jinja" else MAX_TEXT_BYTES
        if path.suffix != ".safetensors" and path.stat().st_size > most:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than {most}: it is no file of a checkpoint, so remove it"
            )
    return paths


def _entries(folder: Path) -> list[Path]:
    try:
        paths = sorted(islice(folder.iterdir(), MAX_FILES + 1))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}): allow this user to read it") from None
    if len(paths) > MAX_FILES:
        raise CheckpointError(f"{folder} holds more than {MAX_FILES} files: name the folder of the checkpoint alone")
    return paths


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint that can change its scores, by its name. Raises CheckpointError."""
    paths = scored_files(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    try:
        is_small = sum(path.stat().st_size for path in paths) <= SMALL_BYTES
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, (map if is_small else pool.map)(_sha256_of_file, paths), strict=True))
    except OSError as error:  # a network file system can lose a file while it is read
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}): copy the checkpoint to a local disk, "
            "or try again"
        ) from None


def verify_hashes(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the hashes of a manifest with those of the files in a folder, both by file name.

    Raises CheckpointError, naming the file, if one is missing, has changed, or was added: libraries read what they
    find, so a file without a hash could change scores.
    """
    for name, digest in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing: copy the checkpoint again")
        if found[name] != digest:
            raise CheckpointError(
                f"{folder / name} does not match its hash in {MANIFEST_NAME}: copy the checkpoint again"
            )
    added = [name for name in found if name not in expected and not UNREAD.fullmatch(name)]
    if added:
        raise CheckpointError(
            f"{folder / added[0]} is not in {MANIFEST_NAME}: remove it, or adopt the checkpoint again"
        )


def stamps_of(*folders: Path) -> Stamps:
    """What tells whether a file of a checkpoint is written to or replaced from now on. Raises CheckpointError."""
    return {path: stamp_of(path) for folder in folders for path in scored_files(folder)}


def refuse_changed(before: Stamps) -> None:
    """Raises CheckpointError if a file has changed: its hash may be another than that of what was loaded."""
    for path, stamp in before.items():
        if not path.is_file() or stamp_of(path) != stamp:
            raise CheckpointError(
                f"{path} was changed while it was loaded: write checkpoints into new folders, and load them when they "
                "are complete"
            )


def stamp_of(path: Path) -> Stamp:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
