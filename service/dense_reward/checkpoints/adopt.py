"""Adopts checkpoints of other programs: finds their files, refuses what cannot be served, writes their manifest."""

import os
import re
import shlex
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from pydantic import JsonValue

from dense_reward.checkpoints.chat_choices import check_end_of_turn, checked_choices, encoder_with
from dense_reward.checkpoints.findings import Checked, example_of, findings
from dense_reward.checkpoints.kept import Earlier, Wanted, earlier_manifest, verify_manifest, with_kept, with_record
from dense_reward.checkpoints.next_step import next_step
from dense_reward.checkpoints.probe import PROBE_TEXTS, ProbeText, probe_of_texts
from dense_reward.checkpoints.slow_step import slow_step
from dense_reward.checkpoints.write_manifest import (
    ManifestFacts,
    default_renderer,
    measured_manifest,
    save_manifest,
)
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.torch.device import chosen_device
from dense_reward.engines.torch.model import DTYPES
from dense_reward.engines.weight_files import ADAPTER_CONFIG, check_files, check_weights_exist, read_json
from dense_reward.errors import CheckpointError
from dense_reward.folders import is_folder
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.heatmap.example import ExampleTokens
from dense_reward.manifest import Role, files_folder, load_manifest
from dense_reward.records import Report
from dense_reward.text.tokenizer import RendererName

Fetch = Callable[[str, str | None], Path]
"""Takes a hub id and a revision, and returns the folder of the downloaded files."""
Draw = Callable[[ExampleTokens], str]
"""Takes the tokens of an example chat, and returns lines for a terminal."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MAX_HUB_ID_CHARACTERS = 96
_NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def _silent(_: str) -> None:
    """The report of a caller that wants none."""


@dataclass(frozen=True, slots=True)
class Located:
    """The folder of a checkpoint's files. `own`: it is the user's, not the hub's cache."""

    folder: Path
    own: bool


@dataclass(frozen=True, slots=True)
class Places:
    """Where a checkpoint's files are, and the folder of its manifest. `hub_id`: the source, if that is a hub id."""

    files: Path
    target: Path
    hub_id: str | None


def adopt(
    source: str,
    *,
    role: Role | None = None,
    run_id: str | None = None,
    renderer: RendererName | None = None,
    end_of_turn: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    texts: Sequence[ProbeText] = PROBE_TEXTS,
    device: str = "cpu",
    template_kwargs: Mapping[str, JsonValue] | None = None,
    response_prefix: str | None = None,
    template_date: str | None = None,
    ignore_manifest: bool = False,
    check: bool = False,
    fetch: Fetch | None = None,
    report: Report = _silent,
    draw: Draw | None = None,
) -> Path:
    """Write the manifest of a checkpoint, and return the folder that holds it: the one to start a service with.

    `source` is a folder (a LoRA adapter's too) or a hub id[@revision]. The manifest is written next to the files,
    or into a side folder that refers to them: `out`, or adopted/NAME if the files are in the hub's cache or read-only.
    Checkpoints adopted with the same `run_id` count as one run. `end_of_turn` is a token, by default the template's.
    `template_kwargs`, `response_prefix` and `template_date` (by default today, if the template writes the date) are
    fields of Manifest; as long as it is undecided what precedes a response, a service refuses texts and chats.
    What is not given is taken from a manifest that the checkpoint already has, unless `ignore_manifest`. `check` writes
    nothing, needs no role, and verifies that such a manifest still matches. `report` gets what was found, and an
    example that `draw` has drawn. Raises CheckpointError, which names the cure.
    """
    wanted = Wanted(
        role=role,
        run_id=run_id,
        renderer=renderer,
        end_of_turn=end_of_turn,
        dtype=dtype,
        template_kwargs=template_kwargs,
        response_prefix=response_prefix,
        template_date=template_date,
    )
    adoption = Adoption(texts, chosen_device(device), check, fetch or download, report)
    places = _places(source, out, adoption.fetch)
    earlier = None if ignore_manifest else earlier_manifest([places.target, places.files], wanted, report)
    found = _checked(places, wanted, earlier, adoption)
    if earlier is not None:
        found = replace(found, manifest=with_record(found.manifest, earlier, wanted, check=check))
    _report_findings(found, draw, report)
    if check:
        _report_check(found, earlier, places, report)
        return places.target
    _make_folder(places.target)
    save_manifest(places.target, found.manifest)
    report(f"adopted: {places.target}")
    report(f"next: {_next(source, places.target, found)}")
    return places.target


@dataclass(frozen=True, slots=True)
class Adoption:
    """How to adopt: the texts and the device of the probe, whether to write nothing, and what fetches and reports."""

    texts: Sequence[ProbeText]
    device: str
    check: bool
    fetch: Fetch
    report: Report


def _checked(places: Places, wanted: Wanted, earlier: Earlier | None, adoption: Adoption) -> Checked:
    """The checkpoint, loaded and measured. What is quick to see is refused before the weights are loaded."""
    files = places.files
    check_files(files)
    check_weights_exist(files)
    base = _adapter_base(files, adoption.fetch)
    load_config(base or files)  # before the tokenizer, which reads config.json too
    tokenizer = load_tokenizer(files)
    _check_choices(places, wanted, earlier, adoption.check)
    chosen = wanted if earlier is None else with_kept(wanted, earlier, tokenizer, adoption.report)
    renderer = chosen.renderer or default_renderer(tokenizer, files)
    choices = checked_choices(tokenizer, renderer, chosen.template_kwargs, chosen.response_prefix, chosen.template_date)
    encoder = encoder_with(tokenizer, renderer, choices, end_of_turn=chosen.end_of_turn, place=files)
    check_end_of_turn(encoder, base or files, files, named=chosen.end_of_turn is not None)
    facts = ManifestFacts(
        role=chosen.role or "sft",
        run_id=chosen.run_id or f"adopted-{uuid.uuid4().hex[:12]}",
        renderer=renderer,
        end_of_turn_id=encoder.end_of_turn_id,
        choices=choices,
        optimiser_step=_optimiser_step(files),
        base_model=places.hub_id,
        dtype=wanted.dtype,
        source=None if places.target.resolve() == files.resolve() else files,
        adapter_base=base,
    )
    gigabytes = sum(path.stat().st_size for path in (base or files).glob("*.safetensors")) / 1e9
    with slow_step(adoption.report, f"hashing and loading {gigabytes:.1f} GB, then computing the probe"):
        manifest, model = measured_manifest(
            places.target,
            facts,
            lambda encoder, limit: probe_of_texts(encoder, limit, adoption.texts),
            device=adoption.device,
            hashed=not adoption.check or earlier is not None,
        )
    return Checked(files, base, manifest, model, tokenizer, encoder)


def _check_choices(places: Places, wanted: Wanted, earlier: Earlier | None, check: bool) -> None:
    """Raises CheckpointError if the role is not known, the dtype is none, or the manifest cannot be written."""
    if wanted.role is None and earlier is None and not check:
        raise CheckpointError(
            f"{places.target} has no {MANIFEST_NAME} yet, so its role must be named: --role sft (the finished "
            "checkpoint), --role reference (the earlier one) or --role policy (a model trained on the rewards)"
        )
    if wanted.dtype is not None and wanted.dtype not in DTYPES:
        raise CheckpointError(f"dtype {wanted.dtype!r} cannot be served: name one of {', '.join(DTYPES)}")
    above = next(path for path in (places.target, *places.target.absolute().parents) if path.exists())
    if not is_folder(above) or not os.access(above, os.W_OK):
        raise CheckpointError(f"{above} cannot be written: name a folder that can be written (--out)")


def _report_findings(found: Checked, draw: Draw | None, report: Report) -> None:
    for line in findings(found):
        report(line)
    example = None if draw is None else example_of(found)
    if draw is not None and example is not None:
        report(f"example, as tokens:\n{draw(example)}")


def _report_check(found: Checked, earlier: Earlier | None, places: Places, report: Report) -> None:
    """Raises CheckpointError if there is a manifest that no longer matches."""
    if earlier is not None:
        verify_manifest(found, earlier)
        report(f"{MANIFEST_NAME}: matches files, tokenizer, chat template and probe ({earlier.folder})")
    report(f"checked: {places.files} can be adopted; nothing was written")


def _next(source: str, target: Path, found: Checked) -> str:
    if found.encoder.undecided("flags") is not None:
        again = source if target.as_posix() == source else str(target)
        return f"dense-reward adopt {shlex.quote(again)} CHOICE, with one of the choices above, for both checkpoints"
    return next_step(target, found.manifest, end_of_turn=found.named_end)


def _places(source: str, out: Path | None, fetch: Fetch) -> Places:
    located = locate(source, fetch)
    folder = located.folder
    if located.own and (files := files_of_side_folder(folder)) is not None:
        return Places(files, out or folder, None)
    in_place = located.own and os.access(folder, os.W_OK)
    return Places(folder, out or (folder if in_place else _side_folder(source)), None if located.own else source)


def files_of_side_folder(folder: Path) -> Path | None:
    """Where the files are, if the folder holds only a manifest that names another folder."""
    try:
        manifest = load_manifest(folder)
    except CheckpointError:  # none, or a broken one
        return None
    return None if manifest.source is None else files_folder(folder, manifest)


def locate(source: str, fetch: Fetch | None = None) -> Located:
    """The folder of a checkpoint's files: `source` itself, or a hub id[@revision], downloaded unless it is cached.

    Raises CheckpointError if there is neither.
    """
    folder = Path(source).expanduser()
    if is_folder(folder):
        return Located(folder, own=True)
    name, _, revision = source.partition("@")
    if folder.is_absolute() or source.startswith((".", "~")) or not _is_hub_id(name):
        raise CheckpointError(
            f"{source}: no such folder, and no hub id (organisation/name, or organisation/name@revision): correct the "
            "path"
        )
    return Located((fetch or download)(name, revision or None), own=False)


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and len(name) <= MAX_HUB_ID_CHARACTERS


def download(name: str, revision: str | None) -> Path:
    """A hub repository's weights, configuration and tokenizer; from the hub's cache if they are there."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_NEEDED_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and the model hub cannot be reached ({_first_line(error)}): correct the "
            "path, or download it where there is a network and give its folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and the model hub reports: {_first_line(error)}"
        ) from error


def _adapter_base(files: Path, fetch: Fetch) -> Path | None:
    """The base model's folder, if the files are a LoRA adapter."""
    path = files / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path} has no base_model_name_or_path: add the base model's folder")
    if is_folder(files / base):  # relative to the adapter, or absolute
        return files / base
    try:
        return locate(base, fetch).folder
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} names the base model {base}, which is not here ({error}): run this in the directory in which the "
            "adapter was trained, or write the base model's folder on this machine into base_model_name_or_path"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be created ({error.strerror}): name a writable folder (--out)"
        ) from error


def _optimiser_step(files: Path) -> int | None:
    """The step that transformers' trainer wrote next to its own checkpoint."""
    path = files / "trainer_state.json"
    if not path.is_file():
        return None
    step = read_json(path).get("global_step")
    return step if isinstance(step, int) else None


def _side_folder(source: str) -> Path:
    return Path("adopted") / re.sub(r"[^\w.@-]+", "--", source.strip("/."))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
