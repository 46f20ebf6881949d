"""The last line of a job: what is finished, and the command that is likely to come next. Must not know jobs."""

import shlex
from collections.abc import Iterable
from pathlib import Path


def finished(result: Path, *next_step: str) -> str:
    """One line: `finished: PATH; next: COMMAND`. `next_step`: the words of the line after `next: `; none: no next."""
    words = " ".join(next_step)
    return f"finished: {result}" + (f"; next: {words}" if words else "")


def serve(run: Path, references: Iterable[str]) -> str:
    """The command that serves the references of a run; if it wrote none, with a checkpoint that the user names."""
    if any(True for _ in references):
        return f"dense-reward serve --run {quoted(run)}"
    return f"dense-reward serve --sft {quoted(run / 'checkpoints' / 'sft')} --reference EARLIER_CHECKPOINT"


def job(name: str, **keys: object) -> str:
    """The command of a job with the user's own CONFIG, and these keys of it."""
    return " ".join(["dense-reward-train", name, "CONFIG", *(quoted(f"{key}={value}") for key, value in keys.items())])


def quoted(value: object) -> str:
    """A value as one word of a shell."""
    return shlex.quote(str(value))
