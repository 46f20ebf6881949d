"""The inputs of bulk scoring: JSONL and Parquet files, and data sets of the `datasets` library, read row by row."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dense_reward.bulk.records import Position, Source, SourceRow
from dense_reward.errors import BulkError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

JSON_LINES = (".jsonl", ".ndjson", ".json")
READ_BYTES = 2**20
READ_ROWS = 256
"""Rows that are decoded together."""


def library(name: str, needed_for: str) -> ModuleType:
    """An optional library. Raises SettingsError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise SettingsError(f"{needed_for} needs {package}: pip install {package}") from None


def open_source(name: str, config: str | None = None) -> Source:
    """The input that a name stands for. Raises SettingsError if there is none, or its library is missing."""
    path, _, split = _split_name(name)
    if path.is_file():
        if split:
            raise SettingsError(f"{path} is a file and has no splits: leave out :{split}")
        return _open_file(path)
    if path.is_dir():
        return _open_saved(path, split)
    if name.endswith((*JSON_LINES, ".parquet")) or name.startswith(("/", "./", "../", "~")):
        raise SettingsError(f"{name}: no such file: correct the path")
    return _open_data_set(name, config)


def _split_name(name: str) -> tuple[Path, str, str]:
    """A path and the split behind its colon; a file's own name can hold a colon too."""
    if Path(name).exists():
        return Path(name), "", ""
    place, colon, split = name.rpartition(":")
    return (Path(place), colon, split) if colon else (Path(name), "", "")


def _open_file(path: Path) -> Source:
    if path.suffix == ".parquet":
        return ParquetSource.of(path)
    if path.suffix in JSON_LINES:
        with path.open("rb") as file:
            if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                raise SettingsError(f"{path} is one JSON list: write it as JSONL, one object per line")
        content, lines = _content(path)
        return JsonLines(path, {"kind": "jsonl", **content}, lines)
    raise SettingsError(f"{path}: the suffix must be {', '.join(JSON_LINES)} or .parquet: convert it, or rename it")


def _content(path: Path) -> tuple[dict[str, object], int]:
    """The size and SHA-256 of a file, and its lines, at the disk's speed: far faster than scoring it."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                lines, last = lines + block.count(b"\n"), block[-1:]
            return {"bytes": file.tell(), "sha256": digest.hexdigest()}, lines + (last != b"\n")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}): allow this user to read it") from None


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file with a JSON object in each line. A row's number is that of its line, from 0; empty lines are no rows."""

    path: Path
    identity: Mapping[str, object]
    total: int
    arrow_schema: object | None = None

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        with self.path.open("rb") as file:
            file.seek(start.offset)
            offset = start.offset
            for number, line in enumerate(file, start.row):
                if (number - start.row) % every == 0:
                    yield Position(number, offset)
                offset += len(line)

    def rows(self, start: Position) -> Iterator[SourceRow]:
        with self.path.open("rb") as file:
            file.seek(start.offset)
            offset = start.offset
            for number, line in enumerate(file, start.row):
                offset += len(line)
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                if text.strip():
                    yield _json_row(number, text, Position(number + 1, offset))


def _json_row(number: int, line: bytes, end: Position) -> SourceRow:
    try:
        cells = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return SourceRow(number, {}, end, f"line {number + 1} is not JSON ({error}): correct it")
    if not isinstance(cells, dict):
        return SourceRow(number, {}, end, f"line {number + 1} is no JSON object: write {{...}} with the columns")
    return SourceRow(number, cells, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError if it has a key twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """A Parquet file, read a row group at a time."""

    path: Path
    identity: Mapping[str, object]
    total: int
    arrow_schema: object | None

    @classmethod
    def of(cls, path: Path) -> "ParquetSource":
        """Raises SettingsError if the file is not Parquet."""
        parquet = library("pyarrow.parquet", "a Parquet file")
        arrow = library("pyarrow", "a Parquet file")
        try:
            with parquet.ParquetFile(path) as file:
                total, schema = file.metadata.num_rows, file.schema_arrow
        except (arrow.ArrowInvalid, OSError) as error:
            raise SettingsError(f"{path} cannot be read as Parquet ({error}): copy it again") from None
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if twice:
            raise SettingsError(f"{path} has several columns {twice[0]!r}: rename all but one")
        return cls(path, {"kind": "parquet", **_content(path)[0]}, total, schema)

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        return map(Position, range(start.row, self.total, every))

    def rows(self, start: Position) -> Iterator[SourceRow]:
        parquet = library("pyarrow.parquet", "a Parquet file")
        with parquet.ParquetFile(self.path, memory_map=True) as file:
            number = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start.row:
                    number += rows
                    continue
                for batch in file.iter_batches(READ_ROWS, row_groups=[group]):
                    skipped = min(max(0, start.row - number), batch.num_rows)
                    yield from _arrow_rows(batch.slice(skipped), number + skipped)
                    number += batch.num_rows


@dataclass(frozen=True, slots=True)
class DataSet:
    """A split of a data set of the `datasets` library."""

    data: Any
    identity: Mapping[str, object]

    @property
    def total(self) -> int:
        return len(self.data)

    @property
    def arrow_schema(self) -> object | None:
        schema: object = self.data.features.arrow_schema
        return schema

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        return map(Position, range(start.row, self.total, every))

    def rows(self, start: Position) -> Iterator[SourceRow]:
        if start.row >= self.total:  # which `select` refuses
            return
        rest = self.data.select(range(start.row, len(self.data))).with_format("arrow")
        number = start.row
        for table in rest.iter(READ_ROWS):
            yield from _arrow_rows(table, number)
            number += table.num_rows


def _arrow_rows(table: "pa.Table", first: int) -> Iterator[SourceRow]:
    for number, cells in enumerate(table.to_pylist(), first):
        yield SourceRow(number, cells, Position(number + 1))


def _open_saved(folder: Path, split: str) -> Source:
    """A folder that `datasets` saved."""
    datasets = library("datasets", "a data set")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise SettingsError(f"{folder} was not saved by datasets (save_to_disk): name a file in it") from None
    return _chosen(datasets, loaded, str(folder), split)


def _open_data_set(name: str, config: str | None) -> Source:
    datasets = library("datasets", f"the data set {name} (there is no such file)")
    repository, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config)
    except Exception as error:  # the library raises many kinds, also of its own dependencies
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(f"{name} is no file, and datasets cannot load it: {reason}") from None
    return _chosen(datasets, loaded, name if config is None else f"{name} ({config})", split)


def _chosen(datasets: ModuleType, loaded: object, name: str, split: str) -> Source:
    if isinstance(loaded, datasets.DatasetDict):
        names = list(loaded)
        if not split and len(names) == 1:
            split = names[0]
        if split not in names:
            raise SettingsError(f"{name} has the splits {', '.join(names)}: write {name.partition(':')[0]}:{names[0]}")
        loaded = loaded[split]
    elif split:
        raise SettingsError(f"{name} has no splits: leave out :{split}")
    if not isinstance(loaded, datasets.Dataset):
        raise BulkError(f"{name} is streamed and cannot be resumed: save it with save_to_disk first")
    identity = {"kind": "datasets", "rows": len(loaded), "fingerprint": loaded._fingerprint}
    return DataSet(loaded, identity)
