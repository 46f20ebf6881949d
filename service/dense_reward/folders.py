"""How a manifest names folders of other checkpoints: relative if near, else by hub id and revision."""

import os
import re
from pathlib import Path

NEAR_FOLDERS = 4
"""Folders to go up at most from a manifest to one that also holds the other folder, for a relative path to it."""
_IN_HUB_CACHE = re.compile(r"/models--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; also for a path that no system accepts, as one that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def folder_name(folder: Path, other: Path) -> str:
    """How the manifest in `folder` names another folder, of its files or of a base model, to be found after a move.

    A relative path if both are below one folder near the manifest; a hub id@revision if the other is in the hub's cache
    elsewhere; else the absolute path.
    """
    folder, other = folder.resolve(), other.resolve()
    relative = Path(os.path.relpath(other, folder)).as_posix()
    above = relative.split("/").count("..")
    if above <= NEAR_FOLDERS and above < len(folder.parts) - 1:
        return relative if relative.startswith(".") else f"./{relative}"
    name = _hub_name(other.as_posix())
    found = [] if name is None else _in_hub_cache(name)
    return name if name is not None and other in [place.resolve() for place in found] else str(other)


def named_folders(folder: Path, name: str) -> list[Path]:
    """The folders that `folder_name` may have named in the manifest of `folder`, the likeliest first.

    A path into a hub's cache also says the hub id and revision, which this machine may have in another cache.
    """
    if not name.startswith(("/", ".")):
        return _in_hub_cache(name)
    hub_name = _hub_name(name)
    return [Path(os.path.normpath(folder.resolve() / name)), *(_in_hub_cache(hub_name) if hub_name else [])]


def _hub_name(path: str) -> str | None:
    """The hub id@revision of a folder in a hub's cache, by its path; None for other folders."""
    found = _IN_HUB_CACHE.search(path)
    return f"{found['name'].replace('--', '/', 1)}@{found['revision']}" if found else None


def _in_hub_cache(name: str) -> list[Path]:
    """The folder of a hub id@revision, if the hub's cache on this machine holds it."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - clients import this module, and need no hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    repository, _, revision = name.partition("@")
    try:
        return [Path(snapshot_download(repository, revision=revision or None, local_files_only=True))]
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return []
