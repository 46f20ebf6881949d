"""Checkpoints on disk: weights first, manifest last, atomic; and which half-written state a killed run left behind.

Must not know how a model is trained.
"""

import json
import os
import re
import shutil
from pathlib import Path

from dense_reward.checkpoints.write_manifest import ChooseProbe, ManifestFacts, write_manifest
from dense_reward.manifest import MANIFEST_NAME, Manifest
from dense_reward.records import Report
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STEP = re.compile(r"checkpoint-([0-9]+)")


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: ManifestFacts,
    choose_probe: ChooseProbe,
    *,
    device: str = "cpu",
) -> Manifest:
    """Write a model (or a LoRA adapter), its tokenizer and its manifest; `folder` appears whole or not at all.

    A complete checkpoint that is already there is replaced, and kept until the new one is on the disk. The probe is
    measured on `device` from the weights as written. Raises CheckpointError where they could not be served.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    partial, replaced = _partial(folder), _replaced(folder)
    _remove(partial)
    partial.mkdir()
    _save_model(model, partial, adapter=facts.adapter_base is not None)
    tokenizer.save_pretrained(partial)
    manifest = write_manifest(partial, facts, choose_probe, device=device)
    _flush(partial)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _flush_folder(folder.parent)
    _remove(replaced)
    return manifest


def recover(folder: Path) -> None:
    """Undo what a kill between two renames of `write_checkpoint` leaves: the checkpoint under another name."""
    replaced = _replaced(folder)
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)
    _remove(replaced)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint is there: the manifest is written last."""
    return (folder / MANIFEST_NAME).is_file()


def newest_training_state(folder: Path, report: Report) -> Path | None:
    """The newest complete `checkpoint-N` that transformers' trainer left; incomplete ones are removed.

    `trainer_state.json` is the last file that it writes.
    """
    states: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        matched = _STEP.fullmatch(path.name)
        if matched is None:
            continue
        if _parses(path / "trainer_state.json"):
            states[int(matched[1])] = path
        else:
            report(f"removed {path}: a kill had left it incomplete")
            shutil.rmtree(path)
    return states[max(states)] if states else None


def training_step(state: Path) -> int:
    """The optimiser step of a `checkpoint-N`."""
    return int(state.name.removeprefix("checkpoint-"))


def _save_model(model: PreTrainedModel, folder: Path, *, adapter: bool) -> None:
    if adapter:
        # left to itself, peft asks the hub whether the base model's embedding has been resized
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _parses(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _flush(folder: Path) -> None:
    readable = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        # safetensors gives its files to their owner alone; a service often runs as somebody else
        path.chmod(readable)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
