"""Files that are written completely or not at all. Imports the standard library only."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: after a crash it has its old content or all of the new one, never a part.

    Two writers of one path at the same time would share the temporary file: callers must exclude each other.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else the rename can reach the disk before the content
    partial.replace(path)
