"""The chat templates and the tokenizer of a checkpoint, tried before the service uses them beside other pairs."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dense_reward.engines.trial.run import TrialError, check_by_trial, check_tokenizer_by_trial
from dense_reward.engines.weight_files import read_json
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import TEMPLATES_FOLDER, scored_files, stamp_of


def try_templates(files: Path) -> None:
    """Raises CheckpointError, with the cure, if rendering a short chat takes too long or becomes too large.

    A template runs in this process, and one step of it can hold the interpreter for ever.
    """
    scored_files(files)  # no pipe, no file that is too large
    templates = (*_templates(files),)
    try:
        check_by_trial(templates=templates)
    except TrialError as error:
        raise CheckpointError(
            f"{files}: its chat template cannot render a short chat ({error}): correct it, or copy it again from the "
            "checkpoint"
        ) from None


def try_tokenizer(files: Path) -> None:
    """Raises CheckpointError, with the cure, if reading a tokenizer.json, or a short text with it, takes too much.

    A library in Rust ends the process if it has no memory, and its patterns can match for ever.
    """
    scored_files(files)
    path = files / "tokenizer.json"
    if not path.is_file():
        return
    try:
        check_tokenizer_by_trial(path, stamp_of(path))
    except TrialError as error:
        raise CheckpointError(
            f"{path} cannot encode a short text ({error}): copy it again from the checkpoint"
        ) from None


def _templates(files: Path) -> Iterator[str]:
    for path in (files / "chat_template.jinja", *sorted((files / TEMPLATES_FOLDER).glob("*.jinja"))):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (files / name).is_file():
            yield from _strings(read_json(files / name).get("chat_template"))


def _strings(value: object) -> Iterator[str]:
    """One template, a dictionary of them, or a list of dictionaries with a name and a template."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (each for each in value.values() if isinstance(each, str))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
