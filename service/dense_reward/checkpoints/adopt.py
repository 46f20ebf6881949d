"""Adopts checkpoints of other programs: finds their files, refuses what cannot be served, writes their manifest."""

import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from pydantic import JsonValue

from dense_reward.checkpoints.chat_choices import check_end_of_turn, checked_choices, encoder_with, report_chat
from dense_reward.checkpoints.probe import PROBE_TEXTS, ProbeText, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, default_renderer, write_manifest
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.weight_files import ADAPTER_CONFIG, check_files, check_weights_exist, read_json
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Role, is_folder
from dense_reward.records import Report
from dense_reward.text.tokenizer import RendererName

Fetch = Callable[[str, str | None], Path]
"""Takes a hub id and a revision, and returns the folder of the downloaded files."""
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


def adopt(
    source: str,
    *,
    role: Role,
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
    fetch: Fetch | None = None,
    report: Report = _silent,
) -> Path:
    """Write the manifest of a checkpoint, and return the folder that holds it: the one to start a service with.

    `source` is a folder (a LoRA adapter's too) or a hub id[@revision]. The manifest is written next to the files,
    or into a side folder that refers to them: `out`, or adopted/NAME if the files are in the hub's cache or read-only.
    Checkpoints adopted with the same `run_id` count as one run. `end_of_turn` is a token, by default the template's.
    `template_kwargs`, `response_prefix` and `template_date` (by default today, if the template writes the date) are
    fields of Manifest; as long as it is undecided what a response stands after, a service refuses texts and chats.
    Raises CheckpointError, which names the cure.
    """
    located = locate(source, fetch or download)
    files = located.folder
    check_files(files)
    check_weights_exist(files)
    adapter_base = _adapter_base(files, fetch or download)
    load_config(adapter_base or files)  # before the tokenizer, which reads config.json too
    tokenizer = load_tokenizer(files)
    folder = out or (files if located.own and os.access(files, os.W_OK) else _side_folder(source))
    renderer = renderer or default_renderer(tokenizer, files)
    choices = checked_choices(tokenizer, renderer, template_kwargs, response_prefix, template_date)
    encoder = encoder_with(tokenizer, renderer, choices, end_of_turn=end_of_turn, place=files)
    check_end_of_turn(encoder, adapter_base or files, files, named=end_of_turn is not None)
    _make_folder(folder)
    facts = ManifestFacts(
        role=role,
        run_id=run_id or f"adopted-{uuid.uuid4().hex[:12]}",
        renderer=renderer,
        end_of_turn_id=encoder.end_of_turn_id,
        choices=choices,
        optimiser_step=_optimiser_step(files),
        base_model=None if located.own else source,
        dtype=dtype,
        source=None if folder.resolve() == files.resolve() else files,
        adapter_base=adapter_base,
    )
    write_manifest(folder, facts, lambda encoder, limit: probe_of_texts(encoder, limit, texts), device=device)
    report_chat(encoder, report)
    return folder


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
            f"{source}: no such folder, and no hub id (organisation/name, or organisation/name@revision)"
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
            f"{path} names the base model {base}, which is not here ({error}): copy the base model to this machine and "
            "write its folder into base_model_name_or_path"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made ({error.strerror}): name a folder that can be written (--out)"
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
