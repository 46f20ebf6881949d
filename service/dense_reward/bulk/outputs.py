"""The outputs of bulk scoring: rows are added in order, and become safe at each `sync`."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dense_reward.bulk.json_values import json_line
from dense_reward.bulk.parquet_parts import merged, part_of, sync_folder
from dense_reward.bulk.records import Cells
from dense_reward.bulk.sources import library
from dense_reward.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa


class Output(Protocol):
    """A file that grows. What was added after the last `sync` is lost if the process is killed."""

    def begin(self, written: Mapping[str, int]) -> None:
        """Go on behind what a sync has returned, and drop everything else. Raises SettingsError if that is missing."""
        ...

    def add(self, rows: Sequence[Cells]) -> None: ...

    def sync(self) -> dict[str, int]:
        """Make everything that was added safe from a power failure. Returns what `begin` needs to go on behind it."""
        ...

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Complete the file. The last sync must have returned; after a crash in here, call it again."""
        ...

    def tidy(self) -> None:
        """Remove what a complete output does not need."""
        ...


def check_output(out: Path) -> None:
    """Raises SettingsError if an output of this name cannot be written: its suffix decides how."""
    if out.is_dir():
        raise SettingsError(f"--out {out} is a folder: name a file")
    if out.suffix == ".parquet":
        library("pyarrow.parquet", "a Parquet file")
    elif out.suffix not in {".jsonl", ".ndjson"}:
        raise SettingsError(f"--out {out}: the suffix must be .jsonl or .parquet")


def open_output(
    out: Path, schema: "pa.Schema | None", arrays: Sequence[str], kept_name: Callable[[str], str] = str
) -> Output:
    """The output of a path. `schema`: types of the input; `kept_name`: what the output calls the input's columns.

    Raises SettingsError as check_output.
    """
    check_output(out)
    if out.suffix != ".parquet":
        return JsonLinesOutput(out)
    return ParquetOutput(out, {kept_name(field.name): field.type for field in schema or ()}, arrays)


def remove_output(out: Path) -> None:
    """Remove an output and all that belongs to it."""
    out.unlink(missing_ok=True)
    shutil.rmtree(parts_folder(out), ignore_errors=True)


def parts_folder(out: Path) -> Path:
    """Where the finished parts of a Parquet file wait until all rows are scored."""
    return out.with_name(f"{out.name}.parts")


class JsonLinesOutput:
    """A JSON object in each line."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = -1
        self._size = 0

    def begin(self, written: Mapping[str, int]) -> None:
        self._size = written.get("bytes", 0)
        found = self._out.stat().st_size if self._out.exists() else 0
        if found < self._size:
            raise SettingsError(
                f"{self._out} has {found} bytes, but {self._size} were written: restore it, or give --overwrite"
            )
        self._file = os.open(self._out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.truncate(self._file, self._size)
        sync_folder(self._out.parent)

    def add(self, rows: Sequence[Cells]) -> None:
        lines = memoryview(b"".join(map(json_line, rows)))
        size = len(lines)
        while lines:  # a write can end early
            lines = lines[os.write(self._file, lines) :]
        self._size += size  # only now: a part of the lines, if the disk is full, is dropped when the run goes on

    def sync(self) -> dict[str, int]:
        os.fsync(self._file)
        return {"bytes": self._size}

    def finish(self, metadata: Mapping[str, Any]) -> None:
        os.close(self._file)

    def tidy(self) -> None:
        """There is nothing to remove."""


class ParquetOutput:
    """Rows wait in memory until a sync writes them as a part; the parts become one file at the end."""

    def __init__(self, out: Path, kinds: "Mapping[str, pa.DataType]", arrays: Sequence[str]) -> None:
        self._out, self._kinds, self._arrays = out, kinds, arrays
        self._held: list[Cells] = []
        self._parts = 0

    def begin(self, written: Mapping[str, int]) -> None:
        self._parts = written.get("parts", 0)
        folder = parts_folder(self._out)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(self._parts):
            if not self._part(index).is_file():
                raise SettingsError(f"{self._part(index)} is missing: restore it, or give --overwrite")
        wanted = {self._part(index) for index in range(self._parts)}
        for other in folder.iterdir():
            if other not in wanted:
                other.unlink()

    def add(self, rows: Sequence[Cells]) -> None:
        self._held.extend(rows)

    def sync(self) -> dict[str, int]:
        if self._held:
            part_of(self._held, self._part(self._parts), self._kinds, self._arrays)
            self._parts, self._held = self._parts + 1, []
        return {"parts": self._parts}

    def finish(self, metadata: Mapping[str, Any]) -> None:
        parts = [self._part(index) for index in range(self._parts)]
        merged(parts, self._out, self._kinds, self._arrays, metadata)

    def tidy(self) -> None:
        shutil.rmtree(parts_folder(self._out), ignore_errors=True)

    def _part(self, index: int) -> Path:
        return parts_folder(self._out) / f"{index:06}.parquet"
