"""Parts of a Parquet output, and how they become one file: a column keeps its type, or becomes JSON text."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dense_reward.bulk.json_values import json_text
from dense_reward.bulk.records import Cells
from dense_reward.bulk.sources import library

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa

AS_JSON = {b"json": b"1"}
"""Metadata of a column whose values had no common type: each value is JSON text."""
FITS_NOT = (TypeError, ValueError, OverflowError, NotImplementedError)
"""What pyarrow raises for a value that a type cannot hold."""
GROUP_BYTES = 64 * 2**20
"""A row group of the complete file holds about this much."""
INTEGERS = {"row": "int64", "response_index": "int32", "length": "int32"}
NESTED = {"offsets": "int32", "candidate_reward": "float32"}
NUMBERS = {"sum": "float64", "mean": "float64", "min": "float32"}


def part_of(rows: Sequence[Cells], path: Path, kinds: "Mapping[str, pa.DataType]", arrays: Sequence[str]) -> None:
    """Write rows as one Parquet file, and make it safe from a power failure. `kinds`: of the input's columns."""
    arrow, parquet = _libraries()
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [_column(arrow, _as_utf8(name), [row.get(name) for row in rows], kinds, arrays) for name in names]
    stored = [
        (field, array) if _can_be_stored(arrow, parquet, field) else _as_json(arrow, field.name, array.to_pylist())
        for field, array in columns
    ]
    table = arrow.table([array for _, array in stored], schema=arrow.schema([field for field, _ in stored]))
    _write(path, lambda file: parquet.write_table(table, file))


def merged(
    parts: Sequence[Path],
    out: Path,
    kinds: "Mapping[str, pa.DataType]",
    arrays: Sequence[str],
    metadata: Mapping[str, Any],
) -> None:
    """Write the parts as one file, one part in memory at a time. The file appears only when it is complete."""
    arrow, parquet = _libraries()
    fields = _common(arrow, parquet, parts)
    if not parts:
        fields = {name: arrow.field(name, kind) for name, kind in kinds.items()}
    own = ("row", "response_index", "error", "sum", "mean", "min", "length")
    for name in (*own, *(() if fields.keys() & set(arrays) else arrays)):  # also without a row that was scored
        fields.setdefault(name, arrow.field(name, _own_type(arrow, name, arrays)))
    schema = arrow.schema(list(fields.values())).with_metadata({"dense_reward": json.dumps(metadata)})

    def write(file: BinaryIO) -> None:
        with parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            for group in _groups(arrow, parquet, parts, schema):
                writer.write_table(group)

    _write(out, write)


def _libraries() -> "tuple[ModuleType, ModuleType]":
    return library("pyarrow", "a Parquet file"), library("pyarrow.parquet", "a Parquet file")


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe from a power failure; a file's own sync makes only its content safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _column(
    arrow: "ModuleType", name: str, values: list[Any], kinds: "Mapping[str, pa.DataType]", arrays: Sequence[str]
) -> "tuple[pa.Field, pa.Array]":
    """The field and the values of a column: with the input's type, or the one that pyarrow finds, or as JSON text."""
    own = _own_type(arrow, name, arrays)
    if own is not None:
        return arrow.field(name, own), arrow.array(map(_plain_lists, values), type=own)
    kind_of_input = kinds.get(name)
    if kind_of_input is not None and arrow.types.is_nested(kind_of_input) and _has_text(values):
        kind_of_input = None  # a text of a list of responses: pyarrow would write the list of its characters
    for kind in dict.fromkeys((kind_of_input, None)):  # a column of responses holds one of them here: another type
        with suppress(*FITS_NOT):
            array = arrow.array(values, type=kind)
            return arrow.field(name, array.type), array
    return _as_json(arrow, name, values)


def _has_text(values: Sequence[object]) -> bool:
    return any(isinstance(value, str | bytes) for value in values)


def _as_json(arrow: "ModuleType", name: str, values: Sequence[Any]) -> "tuple[pa.Field, pa.Array]":
    return arrow.field(name, arrow.string(), metadata=AS_JSON), arrow.array(map(_json, values), arrow.string())


def _can_be_stored(arrow: "ModuleType", parquet: "ModuleType", field: "pa.Field") -> bool:
    """Whether Parquet has this type: it has none for an object without keys, and reads at most 100 levels."""
    try:
        parquet.write_table(arrow.schema([field]).empty_table(), file := arrow.BufferOutputStream())
        parquet.read_schema(arrow.BufferReader(file.getvalue()))
    except (arrow.ArrowException, OSError):
        return False
    return True


def _own_type(arrow: "ModuleType", name: str, arrays: Sequence[str]) -> "pa.DataType | None":
    kinds = INTEGERS | NUMBERS | {"error": "string"}
    if name in kinds:
        return arrow.type_for_alias(kinds[name])
    if name == "segment_rewards":
        return arrow.list_(arrow.float32())
    if name not in arrays and name != "candidate_reward":
        return None
    if name in NESTED:
        return arrow.list_(arrow.list_(arrow.type_for_alias(NESTED[name])))
    of = {"token_ids": arrow.int32(), "tokens": arrow.string()}
    return arrow.string() if name == "text" else arrow.list_(of.get(name, arrow.float32()))


def _common(arrow: "ModuleType", parquet: "ModuleType", parts: Sequence[Path]) -> "dict[str, pa.Field]":
    """The fields of all parts: of the type that holds the values of each part, or JSON text."""
    fields: dict[str, pa.Field] = {}
    for part in parts:
        for field in parquet.read_schema(part):
            before = fields.setdefault(field.name, field)
            if not before.equals(field, check_metadata=True):
                fields[field.name] = _of_both(arrow, before, field)
    for part in parts:
        for field in parquet.read_schema(part):
            wanted = fields[field.name]
            if _marks(wanted) != AS_JSON and wanted.type != field.type:
                try:
                    _fitted(arrow, parquet.read_table(part).column(field.name), wanted.type)
                except FITS_NOT:
                    fields[field.name] = arrow.field(field.name, arrow.string(), metadata=AS_JSON)
    return fields


def _of_both(arrow: "ModuleType", one: "pa.Field", other: "pa.Field") -> "pa.Field":
    if AS_JSON not in (_marks(one), _marks(other)):
        with suppress(arrow.ArrowException):
            both = [arrow.schema([one]), arrow.schema([other])]
            return arrow.unify_schemas(both, promote_options="permissive").field(0)
    return arrow.field(one.name, arrow.string(), metadata=AS_JSON)


def _fitted(arrow: "ModuleType", column: "pa.ChunkedArray", kind: "pa.DataType") -> "pa.ChunkedArray":
    """A column with another type. Raises one of FITS_NOT if a value does not fit, such as 2**60 + 1 a float."""
    try:
        return column.cast(kind)
    except arrow.ArrowException:  # objects whose keys are not those of `kind`, in its order
        return arrow.chunked_array([arrow.array(column.to_pylist(), type=kind)])


def _groups(
    arrow: "ModuleType", parquet: "ModuleType", parts: Sequence[Path], schema: "pa.Schema"
) -> "Iterator[pa.Table]":
    held: list[pa.Table] = []
    for part in parts:
        held.append(_as(arrow, parquet.read_table(part), schema))
        if sum(table.nbytes for table in held) >= GROUP_BYTES:
            yield arrow.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield arrow.concat_tables(held).combine_chunks()


def _as(arrow: "ModuleType", table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """A part with the types of all parts."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(arrow.nulls(table.num_rows, field.type))
            continue
        column, own = table.column(field.name), table.schema.field(field.name)
        if _marks(field) == AS_JSON and _marks(own) != AS_JSON:
            columns.append(arrow.array(map(_json, column.to_pylist()), arrow.string()))
        else:
            columns.append(column if own.type == field.type else _fitted(arrow, column, field.type))
    return arrow.table(columns, schema=schema)


def _marks(field: "pa.Field") -> dict[bytes, bytes]:
    return {name: value for name, value in (field.metadata or {}).items() if name in AS_JSON}


def _as_utf8(name: str) -> str:
    """A name with its lone surrogates as escapes: Parquet has no others."""
    return name.encode("utf-8", "backslashreplace").decode()


def _json(value: object) -> str | None:
    return None if value is None else json_text(value)


def _plain_lists(value: object) -> object:
    """Arrays of several dimensions as lists, which pyarrow takes."""
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim > 1 else value
