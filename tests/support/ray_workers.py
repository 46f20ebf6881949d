"""Processes of Ray that the tests' own cluster started; other clusters on the machine are left alone."""

import os
from collections.abc import Iterator
from pathlib import Path


def workers(name: bytes) -> Iterator[int]:
    """The process ids of this process's actors with this in their title."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_worker = name in command.read_bytes()
        except OSError:
            continue
        if is_worker and os.getpid() in ancestors(int(command.parent.name)):
            yield int(command.parent.name)


def ancestors(process: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found: list[int] = []
    while process > 1:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(process)
    return found
