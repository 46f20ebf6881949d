"""Which pairs a service loads at its start, and which folders checkpoints can be loaded from."""

from collections.abc import Sequence
from math import inf
from os.path import isdir, isfile
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from dense_reward.engines.trial.templates import try_templates, try_tokenizer
from dense_reward.errors import CheckpointError, SettingsError
from dense_reward.hashed_files import MANIFEST_NAME, scored_files
from dense_reward.manifest import Manifest, adapter_base_folder, files_folder, load_manifest
from dense_reward.schemas import Strictly
from dense_reward.settings import Settings, read_list

PairName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class PairOfRun(Strictly):
    """A pair of a finished SFT run: its name, and the folders of its two checkpoints."""

    name: PairName
    sft: Path
    reference: Path


class PairSource(Strictly):
    """What to load: its name, and the folders of a pair or of a token head. The body of POST /admin/models."""

    name: PairName
    sft: Path | None = Field(None, description="folder of the sft checkpoint of a pair")
    reference: Path | None = Field(None, description="folder of the reference of a pair")
    token_head: Path | None = Field(None, description="folder of a token head, instead of a pair")

    @model_validator(mode="after")
    def _one_kind(self) -> "PairSource":
        given = [name for name in ("sft", "reference", "token_head") if getattr(self, name) is not None]
        if given not in (["sft", "reference"], ["token_head"]):
            raise ValueError(f"give sft and reference, or token_head alone; this has {' and '.join(given) or 'none'}")
        return self


SOURCES = TypeAdapter(Annotated[list[PairSource], Field(min_length=1)])


def first_pairs(settings: Settings) -> list[Settings]:
    """The settings of each pair and token head of the start, in order. Raises SettingsError, CheckpointError."""
    named = settings.sft is not None or settings.reference is not None
    others = (settings.pairs_file, settings.run, settings.token_head)
    if named + sum(other is not None for other in others) > 1:
        sources = {name: getattr(settings, name) for name in ("pairs_file", "run", "sft", "reference", "token_head")}
        given = ", ".join(f"{name} {value}" for name, value in sources.items() if value is not None)
        raise SettingsError(
            "give either --pairs-file, or --run, or --sft and --reference, or --token-head; flags and variables "
            f"(DENSE_REWARD_...) together give {given}"
        )
    chosen = _chosen(settings)
    if settings.engine != "torch" and any(each.token_head is not None for each in chosen):
        raise SettingsError(f"--engine {settings.engine} computes no token heads: use --engine torch")
    return chosen


def _chosen(settings: Settings) -> list[Settings]:
    if settings.run is not None:
        _refuse_with("--run", settings)
        if "name" in settings.model_fields_set:
            raise SettingsError("--run names each pair after the folder of its reference: leave out --name")
        sources: Sequence[PairOfRun] | Sequence[PairSource] = pairs_of_run(settings.run)
    elif settings.pairs_file is not None:
        _refuse_with("--pairs-file", settings)
        sources = read_list("--pairs-file", settings.pairs_file, SOURCES)
    else:
        return [settings]
    return [settings.model_copy(update=source.model_dump()) for source in sources]


def _refuse_with(given: str, settings: Settings) -> None:
    if settings.engine == "remote":
        raise SettingsError(f"--engine remote serves one pair: replace {given} by --sft, --reference and their URLs")


def pairs_of_run(folder: Path) -> list[PairOfRun]:
    """The sft checkpoint of a run with each of its references, the earliest first.

    `folder` is the run's, or that of its checkpoints. Raises SettingsError if it holds no finished run or no reference,
    CheckpointError for a manifest that cannot be read.
    """
    checkpoints = _checkpoints_of_run(folder)
    sft = _complete(checkpoints / "sft")
    found = [(place, _complete(place)) for place in _folders_in(checkpoints) if place.name != "sft"]
    references = sorted((_step(manifest), place) for place, manifest in found if manifest.role == "reference")
    if not references:
        raise SettingsError(
            f"--run {folder}: {checkpoints} holds no reference: adopt an earlier checkpoint of the run or its base "
            f"model (dense-reward adopt PATH --role reference --run-id {sft.run_id} --out {checkpoints / 'base'}), or "
            "train again with milestones"
        )
    try:
        return [PairOfRun(name=place.name, sft=checkpoints / "sft", reference=place) for _, place in references]
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise SettingsError(f"--run {folder}: a folder's name cannot be that of a pair ({reason}): rename it") from None


def _checkpoints_of_run(folder: Path) -> Path:
    """The folder of a run's checkpoints. Raises SettingsError if there is no finished sft checkpoint in it."""
    if not isdir(folder):
        raise SettingsError(f"--run {folder}: no such folder: name the output_dir of a run of dense-reward-train sft")
    for place in (folder / "checkpoints", folder):
        if isdir(place / "sft"):
            return place
    if isfile(folder / MANIFEST_NAME):
        raise SettingsError(f"--run {folder} is a checkpoint: name the folder of its run, or use --sft and --reference")
    raise SettingsError(
        f"--run {folder} holds no finished sft checkpoint (checkpoints/sft): name the output_dir of a run of "
        "dense-reward-train sft; if that was interrupted, the same command resumes it"
    )


def _folders_in(checkpoints: Path) -> list[Path]:
    """Its folders, without hidden ones, which a run that was killed can leave. Raises SettingsError."""
    try:
        found = sorted(place for place in checkpoints.iterdir() if not place.name.startswith("."))
    except OSError as error:
        raise SettingsError(
            f"--run: {checkpoints} cannot be read ({error.strerror}): allow this user to read it"
        ) from None
    return [place for place in found if isdir(place)]


def _complete(place: Path) -> Manifest:
    """The manifest of a checkpoint of a run. Raises SettingsError if there is none."""
    if not isfile(place / MANIFEST_NAME):
        raise SettingsError(
            f"--run: {place} has no {MANIFEST_NAME}, so it is no complete checkpoint: copy it again, adopt it, or move "
            f"it out of {place.parent}"
        )
    return load_manifest(place)


def _step(manifest: Manifest) -> float:
    """The optimiser step; after all others if it is unknown."""
    return inf if manifest.optimiser_step is None else manifest.optimiser_step


def check_confined(settings: Settings) -> None:
    """Raises CheckpointError if a checkpoint, one of its files or its adapter's base is outside --checkpoints-folder.

    Symbolic links are resolved first, also those of files: a link inside the folder must not lead to a file outside.
    """
    root = settings.checkpoints_folder
    for folder in (settings.sft, settings.reference, settings.token_head):
        if root is None or folder is None:
            continue
        _check_inside(folder, root)
        if not (folder / MANIFEST_NAME).is_file():
            continue  # loading it raises a better error
        manifest = load_manifest(folder)
        files = files_folder(folder, manifest)
        base = adapter_base_folder(folder, manifest) or files
        for place in (files, base):
            _check_inside(place, root)
        for path in (*scored_files(files), *scored_files(base)):  # also those that the manifest does not list
            _check_inside(path, root)


def try_texts_of(settings: Settings) -> None:
    """Raises CheckpointError if a tokenizer or chat template takes too much time or memory to be used beside others."""
    for folder in (settings.sft, settings.reference, settings.token_head):
        if folder is None:
            continue
        manifest = load_manifest(folder)
        if manifest.renderer == "chat":
            try_templates(files_folder(folder, manifest))
        try_tokenizer(files_folder(folder, manifest))


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} is not below {root} (--checkpoints-folder): move it there")
