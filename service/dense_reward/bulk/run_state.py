"""The small file beside an output that says what was written, and the lock that gives an output to one process.

What counts is what the state names: everything behind it in the output is dropped before a run goes on. So a killed
process, a cut last line and a power failure need no other care.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dense_reward.bulk.records import Position
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.errors import BulkError, SettingsError

VERSION = 1
BEGINNING = Position()


@dataclass(slots=True)
class RunState:
    """What was written safely.

    `made_from`: input, options and model; a run goes on only with equal ones. `position`: the first row that is not
    written. `written`: what the output needs to find the end of it (bytes or parts). `rows`, `output_rows`, `errors`:
    counts; `tokens`: the scored ones, the sum of the column `length`. `done`: the output is complete.
    """

    made_from: dict[str, Any]
    position: Position = BEGINNING
    written: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    output_rows: int = 0
    errors: int = 0
    tokens: int = 0
    done: bool = False

    def save(self, file: Path) -> None:
        """Write it completely or not at all."""
        write_whole(file, (json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n").encode())


def state_file(out: Path) -> Path:
    """The state of an output; it stays when the output is complete, and says what it was made from."""
    return out.with_name(f"{out.name}.run.json")


def state_of(out: Path) -> RunState | None:
    """The state that was saved; None if there is none. Raises SettingsError if it cannot be read."""
    file = state_file(out)
    try:
        found = json.loads(file.read_bytes())
        position = Position(**found.pop("position"))
        if found.pop("version") != VERSION:
            raise ValueError("another version wrote it")
        return RunState(position=position, **found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{file} cannot be read ({error}): name another --out, or give --overwrite") from None


def load_state(out: Path, made_from: Mapping[str, Any]) -> RunState:
    """The state of an output that goes on, or a new one. Raises SettingsError if its rows were made otherwise."""
    state = state_of(out)
    if state is None:
        if out.exists():
            raise SettingsError(
                f"{out} exists, but {state_file(out).name} does not: name another --out, or give --overwrite"
            )
        return RunState(dict(made_from))
    if not out.exists() and (state.done or state.written.get("bytes")):
        raise SettingsError(
            f"{out} is gone, but {state_file(out).name} counts its rows: restore it, or give --overwrite"
        )
    if not (state.rows or state.done):
        return RunState(dict(made_from))  # no row is written that could mix with others
    before = {name: value for name, value in state.made_from.items() if name != "model"}  # known only once loaded
    changed = list(differences(before, json.loads(json.dumps(made_from))))
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise SettingsError(
            f"{out} was started with other inputs or options, and their rows must not mix:\n{lines}\n"
            "restore them, name another --out, or give --overwrite to start again"
        )
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each value that differs, named by its place."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name}.{line}" for line in differences(old, new))
        elif old != new:
            yield f"{name}: {json.dumps(old)} then, {json.dumps(new)} now"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold an output. Raises SettingsError if another process holds it. The system releases it if we are killed."""
    file = out.with_name(f".{out.name}.lock")
    while True:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise SettingsError(f"another process writes {out}: wait for it, or name another --out") from None
        if _is_at(file, descriptor):
            break
        os.close(descriptor)  # its holder removed the file while we opened it
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failed write into a BulkError that names the disk, and says that what was written stays."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = "the disk is full" if full else (error.strerror or str(error))
        cure = "free space" if full else "correct it"
        raise BulkError(
            f"{out} cannot be written: {reason}. {cure} and run the same command again: it goes on where the written "
            "rows end"
        ) from error
