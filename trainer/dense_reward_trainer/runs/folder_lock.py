"""One job at a time in a run folder: two would write over each other's files. The end of a process frees its folder.

The lock is one of the operating system (flock) on `.lock` in the folder, so that a kill leaves nothing to clean up.
"""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from dense_reward.records import Report

from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.processes import is_first_process

LOCK_NAME = ".lock"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_HELD_BY_ANOTHER = frozenset({errno.EWOULDBLOCK, errno.EACCES})


@contextmanager
def only_job_in(folder: Path, report: Report, variables: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Keeps other jobs out of a run folder within the block; makes the folder, and removes it if it stays empty.

    Processes of one torchrun or accelerate launch are one job: its first process holds the lock. A file system without
    locks is reported, and the job goes on. Raises JobError if another process holds the lock; ConfigError if the folder
    cannot be written to.
    """
    if not is_first_process(variables):
        yield
        return
    check_place(folder)
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise ConfigError(
            f"output_dir is {folder}, which cannot be made ({error.strerror}): use another output_dir"
        ) from None
    try:
        with _lock(folder / LOCK_NAME, report):
            yield
    finally:
        with suppress(OSError):  # the job has written something
            for place in made:
                place.rmdir()


def check_place(folder: Path) -> None:
    """Raises ConfigError if the folder cannot be made or written to: results would be lost at the end."""
    # not Path.exists, which raises if a parent cannot be read
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.exists(each))
    if not place.is_dir():
        raise ConfigError(f"output_dir is {folder}, but {place} is a file: use another output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir is {folder}, but this user cannot write to {place}: use another output_dir")


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    descriptor = _descriptor(path, report)
    # A forked child would keep the folder locked after its parent was killed.
    _INHERITED.add(descriptor)
    try:
        yield
    finally:
        _INHERITED.discard(descriptor)
        path.unlink(missing_ok=True)  # before the lock ends: it is still ours
        os.close(descriptor)


def _descriptor(path: Path, report: Report) -> int:
    """An open, locked file that is at `path`: the process that held the lock before may have removed its own."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                words = _words_about(descriptor)
                os.close(descriptor)
                raise JobError(
                    f"{path.parent}: another process works in this folder{words}: wait until it ends or stop it, or "
                    "use another output_dir"
                ) from None
            report(
                f"{path.parent} is on a file system without locks ({os.strerror(error.errno or 0)}): make sure "
                "that no other job uses this folder"
            )
        else:
            if not _is_at(descriptor, path):
                os.close(descriptor)
                continue
        _describe(descriptor)
        return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe(descriptor: int) -> None:
    """Who holds the lock, for the message of the next process. A full disk does not matter here."""
    who = {"pid": os.getpid(), "host": platform.node(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)


def _words_about(descriptor: int) -> str:
    """Such as ` (pid 12 on host a, started 2026-01-01T00:00:00+00:00)`; nothing if that is not known."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        host = "" if who["host"] == platform.node() else f" on host {who['host']}"
        return f" (pid {who['pid']}{host}, started {who['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


_INHERITED: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _INHERITED:
        os.close(descriptor)
    _INHERITED.clear()


os.register_at_fork(after_in_child=_close_inherited)
