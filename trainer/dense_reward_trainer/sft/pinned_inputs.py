"""The inputs of an SFT run that a resumed run must have again, the encoded rows included, and what changed if not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dense_reward.hashed_files import hash_files
from dense_reward.manifest import sha256_of_text

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.tokenised import TokenisedRow, rows_sha256
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.run_folder import Run, changed_inputs, changed_versions, open_run, pin, pinned
from dense_reward_trainer.sft.chat import TEMPLATE_DATE
from dense_reward_trainer.sft.initial_model import InitialModel

_ROWS, _BASE, _PROCESSES = "encoded rows", "base model", "processes"
_DATE_CALLS = ("strftime_now", "now(", "date_string")
# What changed, in the order in which one change explains the others, and the cure.
_CAUSES: Mapping[str, str] = {
    "data": "different data (the demonstrations): restore the source",
    "tokenizer": "a different tokenizer: restore its files, or name the hub's older revision (base_model=ID@REVISION)",
    "chat template": "a different chat template: restore it, or name the hub's older revision (base_model=ID@REVISION)",
    _BASE: "other weights of the base model: restore its files, or name the hub's older revision "
    "(base_model=ID@REVISION)",
}


def open_pinned_run(
    config: SftConfig, initial: InitialModel, data: str, rows: Sequence[TokenisedRow], processes: int = 1
) -> Run:
    """Opens the run folder and records hashes of data, tokenizer, chat template, base model and encoded rows.

    Records the number of processes too: it decides how many demonstrations a step processes.

    Raises ConfigError, which says what changed, if a resumed run would learn other tokens. Nothing is written then.
    """
    identity = {
        "data": data,
        "tokenizer": initial.tokenizer_sha256,
        "chat template": sha256_of_text(f"{initial.encoder.renderer}\n{initial.tokenizer.chat_template}"),
        _ROWS: rows_sha256(rows),
        _PROCESSES: str(processes),
    }
    if initial.base is not None:
        identity[_BASE] = _base_sha256(initial.base)
    template_date = initial.encoder.choices.template_date
    if template_date is not None:
        identity[TEMPLATE_DATE] = template_date
    changed = changed_inputs(config.output_dir, identity)
    if changed:
        reason = next((words for name, words in _CAUSES.items() if name in changed), None)
        if reason is None and _PROCESSES in changed:
            before = pinned(config.output_dir)[_PROCESSES]
            reason = f"another number of processes ({before} -> {processes}): launch it on as many GPUs as before"
        reason = reason or _unknown(config, initial)
        raise ConfigError(
            f"{config.output_dir} holds a run that was started with {reason}; or start a new run in another "
            "output_dir. The run so far is kept"
        )
    opened = open_run("sft", config)
    pin(opened, identity)
    return opened


def _base_sha256(folder: Path) -> str:
    """One hash of weights and configuration."""
    files = {
        name: value for name, value in hash_files(folder).items() if name.endswith((".safetensors", "config.json"))
    }
    return sha256_of_text(json.dumps(files, sort_keys=True))


def _unknown(config: SftConfig, initial: InitialModel) -> str:
    """The likely reason why equal data, tokenizer and template gave other ids."""
    same = "different encoded rows, although data, tokenizer and chat template are the same"
    template = str(initial.tokenizer.chat_template)
    if any(call in template for call in _DATE_CALLS):
        return f"{same}: the chat template writes a date, so a run cannot continue on another day. Fix the date in it"
    versions = changed_versions(config.output_dir)
    if versions:
        return f"{same}: libraries changed ({', '.join(versions)}). Install the older versions"
    return f"{same}: the template or the tokenizer reads something that changed. Restore it"
