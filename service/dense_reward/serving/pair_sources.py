"""Which pairs a service loads at its start, and which folders checkpoints can be loaded from."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from dense_reward.errors import CheckpointError, SettingsError
from dense_reward.manifest import MANIFEST_NAME, adapter_base_folder, files_folder, load_manifest
from dense_reward.schemas import Strictly
from dense_reward.settings import Settings, read_list


class PairSource(Strictly):
    """A pair to load: its name, and the folders of its two checkpoints. The body of POST /admin/models."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sft: Path
    reference: Path


SOURCES = TypeAdapter(Annotated[list[PairSource], Field(min_length=1)])


def first_pairs(settings: Settings) -> list[Settings]:
    """The settings of each pair that is loaded at the start, in order. Raises SettingsError."""
    if settings.pairs_file is None:
        return [settings]
    if settings.sft is not None or settings.reference is not None:
        raise SettingsError("give either --pairs-file, or --sft and --reference")
    if settings.engine == "remote":
        raise SettingsError(
            "--engine remote serves one pair: replace --pairs-file by --sft, --reference and their URLs"
        )
    sources = read_list("--pairs-file", settings.pairs_file, SOURCES)
    return [settings.model_copy(update=source.model_dump()) for source in sources]


def check_confined(settings: Settings) -> None:
    """Raises CheckpointError if a checkpoint, one of its files or its adapter's base is outside --checkpoints-folder.

    Symbolic links are resolved first, also those of files: a link inside the folder must not lead to a file outside.
    """
    root = settings.checkpoints_folder
    for folder in (settings.sft, settings.reference):
        if root is None or folder is None:
            continue
        _check_inside(folder, root)
        if not (folder / MANIFEST_NAME).is_file():
            continue  # loading it raises a better error
        manifest = load_manifest(folder)
        files = files_folder(folder, manifest)
        base = adapter_base_folder(folder, manifest) or files
        listed = [files / name for name in manifest.files] + [base / name for name in manifest.adapter_base_files]
        for path in (files, base, *listed):
            _check_inside(path, root)


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} is not below {root} (--checkpoints-folder): move it there")
