"""Atomic checkpoints: weights first, manifest last. Also finds and removes the incomplete states of a killed run."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dense_reward.checkpoints.write_manifest import (
    ChooseProbe,
    ManifestFacts,
    unmeasured_manifest,
    write_manifest,
)
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Manifest, check_same_texts
from dense_reward.records import Report
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_reward_trainer.runs.end_of_turn import set_model_end, tokenizer_with_end, write_generation_config
from dense_reward_trainer.runs.progress import busy

_STEP = re.compile(r"checkpoint-([0-9]+)")


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: ManifestFacts,
    choose_probe: ChooseProbe,
    *,
    device: str = "cpu",
    weights: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Writes a model (or a LoRA adapter), its tokenizer and its manifest; `folder` appears complete or not at all.

    The files name `facts.end_of_turn_id` as the end of a text. Replaces a complete checkpoint in `folder`, but keeps it
    until the new one is on disk. Measures the probe on `device`, from the weights as written. Raises CheckpointError if
    they could not be served. `weights`: the whole weights, on the CPU, of a model that several processes share.
    """

    def fill(partial: Path) -> Manifest:
        with busy(f"writing and hashing {folder}"):
            set_model_end(model, tokenizer, facts.end_of_turn_id)
            _save_model(model, partial, weights, adapter=facts.adapter_base is not None)
            tokenizer_with_end(tokenizer, facts.end_of_turn_id).save_pretrained(partial)
            return write_manifest(partial, facts, choose_probe, device=device)

    return _replace_whole(folder, fill)


def write_named_checkpoint(
    folder: Path, facts: ManifestFacts, choose_probe: ChooseProbe, *, device: str = "cpu"
) -> Manifest:
    """Writes only a manifest, of the checkpoint whose files are in `facts.source`; otherwise as `write_checkpoint`."""
    return _replace_whole(folder, lambda partial: write_manifest(partial, facts, choose_probe, device=device))


def writes_same_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: ManifestFacts) -> bool:
    """Whether the files in `facts.source` can be a pair with what `write_checkpoint` would write of the model.

    Tokenizer, chat template, vocabulary and end of turn must be the same. Loads no weights.
    """
    with tempfile.TemporaryDirectory() as name:
        written = Path(name)
        if facts.adapter_base is None:
            model.config.save_pretrained(written)
        tokenizer_with_end(tokenizer, facts.end_of_turn_id).save_pretrained(written)
        try:
            own, _ = unmeasured_manifest(written, replace(facts, source=None), hashed=False)
            named, _ = unmeasured_manifest(written, replace(facts, adapter_base=None), hashed=False)
            check_same_texts(own, named)
        except CheckpointError:
            return False
    return True


def _replace_whole(folder: Path, fill: Callable[[Path], Manifest]) -> Manifest:
    """Fills a new folder and renames it to `folder`; what was there is kept until then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    partial, replaced = _partial(folder), _replaced(folder)
    _remove(partial)
    partial.mkdir()
    manifest = fill(partial)
    _flush(partial)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _flush_folder(folder.parent)
    _remove(replaced)
    return manifest


def recover(folder: Path) -> None:
    """Restores the old checkpoint after a kill between the two renames of `write_checkpoint`."""
    replaced = _replaced(folder)
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)
    _remove(replaced)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a complete checkpoint: the manifest is written last."""
    return (folder / MANIFEST_NAME).is_file()


def newest_training_state(folder: Path, report: Report) -> Path | None:
    """The newest complete `checkpoint-N` of transformers' trainer; removes incomplete ones.

    The trainer writes `trainer_state.json` last, so a folder without it is incomplete.
    """
    states: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        matched = _STEP.fullmatch(path.name)
        if matched is None:
            continue
        if _parses(path / "trainer_state.json"):
            states[int(matched[1])] = path
        else:
            report(f"removed {path}: a kill or a full disk had left it incomplete")
            shutil.rmtree(path)
    return states[max(states)] if states else None


def training_step(state: Path) -> int:
    """N, the optimiser step, of a `checkpoint-N`."""
    return int(state.name.removeprefix("checkpoint-"))


def _save_model(model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor] | None, *, adapter: bool) -> None:
    given = None if weights is None else dict(weights)  # a copy: transformers empties it
    if adapter:
        write_generation_config(model, folder)
        # By default peft queries the hub to find out whether the base model's embedding was resized.
        model.save_pretrained(folder, state_dict=given, save_embedding_layers=False)
        return
    model.save_pretrained(folder, state_dict=given)
    if weights is not None:
        # DeepSpeed's copy of the model has another type than its weights as written
        config = json.loads((folder / "config.json").read_bytes())
        config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        # safetensors makes its files readable only by their owner; a service often runs as another user.
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
