"""The inputs of bulk scoring: JSONL and Parquet files, and data sets of the `datasets` library, read row by row."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from dense_reward.bulk.records import Position, Source, SourceRow
from dense_reward.errors import BulkError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
COMPRESSED_STARTS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")
MAX_DEPTH = 200
"""Levels of lists and objects in a row: what reads and writes it is recursive."""
READ_BYTES = 2**20
READ_ROWS = 256
"""Rows that are decoded together."""


def library(name: str, needed_for: str) -> ModuleType:
    """An optional library. Raises SettingsError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0] if name != "ray.data" else "'ray[data]'"
        raise SettingsError(f"{needed_for} needs {package}: pip install {package}") from None


def open_source(name: str, config: str | None = None) -> Source:
    """The input that a name stands for. Raises SettingsError if there is none, or its library is missing."""
    try:
        path, split = _split_name(name)
        if path.exists() and config is not None:
            raise SettingsError(f"--config {config} is for a data set by name, but {path} is here: leave it out")
        if path.is_file():
            if split:
                raise SettingsError(f"{path} is a file and has no splits: leave out :{split}")
            return _open_file(path)
        if path.is_dir():
            return _open_saved(path, split)
        if path.exists():
            raise SettingsError(f"{path} is a pipe or a device, which cannot be read twice: write it to a file first")
    except OSError as error:
        raise SettingsError(f"{name} cannot be read ({error.strerror}): correct the path, or its permissions") from None
    if name.endswith((*JSON_LINES, *COMPRESSED, ".parquet")) or name.startswith(("/", "./", "../", "~")):
        raise SettingsError(f"{name}: no such file: correct the path")
    return _open_data_set(name, config)


def _split_name(name: str) -> tuple[Path, str]:
    """A path and the split behind its colon; a file's own name can hold a colon too."""
    if Path(name).exists() or ":" not in name:
        return Path(name), ""
    place, _, split = name.rpartition(":")
    return Path(place), split


def _open_file(path: Path) -> Source:
    if path.suffix == ".parquet":
        return ParquetSource.of(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if path.suffix in COMPRESSED or start.startswith(COMPRESSED_STARTS):
        raise SettingsError(f"{path} is compressed: decompress it first")
    if path.suffix not in JSON_LINES:
        raise SettingsError(f"{path}: the suffix must be {', '.join(JSON_LINES)} or .parquet: convert it, or rename it")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SettingsError(f"{path} is UTF-16: convert it to UTF-8")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise SettingsError(f"{path} is one JSON list: write it as JSONL, one object per line")
    content = _content(path)
    return JsonLines(path, content.identity("jsonl"), content.lines, content.size)


class Content(NamedTuple):
    """The size of a file in bytes, its SHA-256 and the number of its lines."""

    size: int
    sha256: str
    lines: int

    def identity(self, kind: str) -> dict[str, object]:
        return {"kind": kind, "bytes": self.size, "sha256": self.sha256}


def _content(path: Path) -> Content:
    """Reads the file at the disk's speed: far faster than scoring it."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            lines, last = lines + block.count(b"\n"), block[-1:]
        return Content(file.tell(), digest.hexdigest(), lines + (last != b"\n"))


@contextmanager
def _opened(path: Path, size: int) -> Iterator[BinaryIO]:
    """The file whose content was hashed. Raises BulkError if it has become shorter, or cannot be read any more."""
    try:
        with path.open("rb") as file:
            yield file
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BulkError(
            f"{path} cannot be read any more ({error.strerror or error}): correct that, and run the same command again"
        ) from None
    if found < size:
        raise BulkError(f"{path} was {size} bytes and is {found} now: restore it, or give --overwrite")


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file with a JSON object in each line. A row's number is that of its line, from 0; empty lines are no rows.

    What is appended to the file after it was opened is not read: it is not in the hash.
    """

    path: Path
    identity: Mapping[str, object]
    total: int
    size: int
    arrow_schema: None = None

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        for number, offset, _ in self._lines(start):
            if (number - start.row) % every == 0:
                yield Position(number, offset)

    def rows(self, start: Position) -> Iterator[SourceRow]:
        for number, offset, line in self._lines(start):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if text.strip():
                yield _json_row(number, text, Position(number + 1, offset + len(line)))

    def _lines(self, start: Position) -> Iterator[tuple[int, int, bytes]]:
        """Each line with its number and its offset."""
        with _opened(self.path, self.size) as file:
            file.seek(start.offset)
            offset = start.offset
            for number, line in enumerate(file, start.row):
                if offset >= self.size:
                    break
                known = line[: self.size - offset]
                yield number, offset, known
                offset += len(known)


def _json_row(number: int, line: bytes, end: Position) -> SourceRow:
    try:
        cells = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return SourceRow(number, {}, end, f"line {number + 1} is not JSON ({error}): correct it")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(cells):
        return SourceRow(number, {}, end, f"line {number + 1} is nested deeper than {MAX_DEPTH} levels: flatten it")
    if not isinstance(cells, dict):
        return SourceRow(number, {}, end, f"line {number + 1} is no JSON object: write {{...}} with the columns")
    return SourceRow(number, cells, end)


def _is_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


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
    size: int
    arrow_schema: "pa.Schema"

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
        content = _content(path)
        return cls(path, content.identity("parquet"), total, content.size, schema)

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        return map(Position, range(start.row, self.total, every))

    def rows(self, start: Position) -> Iterator[SourceRow]:
        parquet = library("pyarrow.parquet", "a Parquet file")
        with (
            _opened(self.path, self.size),
            parquet.ParquetFile(self.path, memory_map=True, page_checksum_verification=True) as file,
        ):
            first = 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if end > start.row:
                    yield from self._group(file, group, range(first, end), start.row)
                first = end

    def _group(self, file: "pq.ParquetFile", group: int, numbers: range, start: int) -> Iterator[SourceRow]:
        """The rows of a row group from number `start` on. If a part of it is damaged, the rest has faults."""
        arrow = library("pyarrow", "a Parquet file")
        number = numbers.start
        try:
            for batch in file.iter_batches(READ_ROWS, row_groups=[group]):
                skipped = min(max(0, start - number), batch.num_rows)
                yield from _arrow_rows(batch.slice(skipped), number + skipped)
                number += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            yield from _damaged(str(self.path), range(max(start, number), numbers.stop), error)


@dataclass(frozen=True, slots=True)
class DataSet:
    """A split of a data set of the `datasets` library."""

    data: Any
    identity: Mapping[str, object]

    @property
    def total(self) -> int:
        return len(self.data)

    @property
    def arrow_schema(self) -> "pa.Schema":
        schema: pa.Schema = self.data.features.arrow_schema
        return schema

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        return map(Position, range(start.row, self.total, every))

    def rows(self, start: Position) -> Iterator[SourceRow]:
        arrow = library("pyarrow", "a data set")
        tables = self.data.with_format("arrow")
        for first in range(start.row, self.total, READ_ROWS):
            numbers = range(first, min(first + READ_ROWS, self.total))
            try:
                table = tables[numbers.start : numbers.stop]
            except (arrow.ArrowException, OSError) as error:
                yield from _damaged("the data set", numbers, error)
            else:
                yield from _arrow_rows(table, first)


def _arrow_rows(table: "pa.Table | pa.RecordBatch", first: int) -> Iterator[SourceRow]:
    """The rows of a table. Those with a value that Python cannot hold have a fault, such as text that is not UTF-8."""
    try:
        table.validate(full=True)  # files of `datasets` have no checksums: damaged offsets would read other memory
        rows = table.to_pylist()
    except (ValueError, OverflowError) as error:
        if table.num_rows == 1:
            yield from _damaged("this row", range(first, first + 1), error)
            return
        for index in range(table.num_rows):
            yield from _arrow_rows(table.slice(index, 1), first + index)
        return
    for number, cells in enumerate(rows, first):
        yield SourceRow(number, cells, Position(number + 1))


def _damaged(what: str, numbers: range, error: Exception) -> Iterator[SourceRow]:
    """Rows that cannot be read, and why."""
    many = f" up to row {numbers.stop - 1}" if len(numbers) > 1 else ""
    for number in numbers:
        yield SourceRow(
            number, {}, Position(number + 1), f"{what} cannot be read{many} ({_reason(error)}): copy it again"
        )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_saved(folder: Path, split: str) -> Source:
    """A folder that `datasets` saved."""
    datasets = library("datasets", "a data set")
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise SettingsError(f"{folder} was not saved by datasets (save_to_disk): name a file in it")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # of JSON, Arrow, the system and the library
        raise SettingsError(f"{folder} is damaged, datasets cannot load it ({_reason(error)}): copy it again") from None
    return _chosen(datasets, loaded, str(folder), split)


def data_set_name(name: str) -> tuple[str, str | None, str]:
    """Hub id, configuration and split of NAME[:SPLIT], or of NAME[:CONFIG]@SPLIT as in the trainer's recipes."""
    if "@" in name:
        place, _, split = name.rpartition("@")
        repository, _, config = place.partition(":")
        return repository, config or None, split
    repository, _, split = name.partition(":")
    return repository, None, split


def _open_data_set(name: str, config: str | None) -> Source:
    datasets = library("datasets", f"the data set {name} (there is no such file)")
    repository, named, split = data_set_name(name)
    if config is not None and named not in (None, config):
        raise SettingsError(f"{name} and --config {config} name different configurations: leave out one of them")
    config = config or named
    try:
        loaded = datasets.load_dataset(repository, config)
    except Exception as error:  # the library raises many kinds, also of its own dependencies
        raise SettingsError(f"{name} is no file, and datasets cannot load it: {_reason(error)}") from None
    return _chosen(datasets, loaded, name if config is None else f"{name} ({config})", split)


def _chosen(datasets: ModuleType, loaded: object, name: str, split: str) -> Source:
    if isinstance(loaded, datasets.DatasetDict):
        names, place = list(loaded), name if Path(name).exists() else data_set_name(name)[0]
        if not split and len(names) == 1:
            split = names[0]
        if split not in names:
            raise SettingsError(f"{name} has the splits {', '.join(names)}: write {place}:{names[0]}")
        loaded = loaded[split]
    elif split:
        raise SettingsError(f"{name} has no splits: leave out :{split}")
    if not isinstance(loaded, datasets.Dataset):
        raise BulkError(f"{name} is streamed and cannot be resumed: save it with save_to_disk first")
    # The fingerprint names how the data was made; a file that was changed since then keeps it.
    files = sorted(Path(each["filename"]) for each in loaded.cache_files)
    content = hashlib.sha256("".join(_content(file).sha256 for file in files).encode()).hexdigest()
    identity = {"kind": "datasets", "rows": len(loaded), "fingerprint": loaded._fingerprint, "sha256": content}
    return DataSet(loaded, identity)
