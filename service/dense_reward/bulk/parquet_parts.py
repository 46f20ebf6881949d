"""Parts of a Parquet output, and how they become one file: a column keeps its type, or becomes JSON text."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dense_reward.bulk.records import Cells
from dense_reward.bulk.sources import library

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa

AS_JSON = {b"json": b"1"}
"""Metadata of a column whose values had no common type: each value is JSON text."""
GROUP_BYTES = 64 * 2**20
"""A row group of the complete file holds about this much."""
INTEGERS = {"row": "int64", "response_index": "int32", "length": "int32"}
NESTED = {"offsets": "int32", "candidate_reward": "float32"}
NUMBERS = {"sum": "float64", "mean": "float64", "min": "float32"}


def part_of(rows: Sequence[Cells], path: Path, schema: "pa.Schema | None", arrays: Sequence[str]) -> None:
    """Write rows as one Parquet file, and make it safe from a power failure."""
    arrow, parquet = _libraries()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_column(arrow, name, [row.get(name) for row in rows], schema, arrays) for name in names]
    table = arrow.table([array for _, array in columns], schema=arrow.schema([field for field, _ in columns]))
    _write(path, lambda file: parquet.write_table(table, file))


def merged(parts: Sequence[Path], out: Path, metadata: Mapping[str, Any]) -> None:
    """Write the parts as one file, one part in memory at a time. The file appears only when it is complete."""
    arrow, parquet = _libraries()
    schema = _common([parquet.read_schema(part) for part in parts])
    schema = schema.with_metadata({"dense_reward": json.dumps(metadata)})

    def write(file: BinaryIO) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
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
    arrow: "ModuleType", name: str, values: list[Any], schema: "pa.Schema | None", arrays: Sequence[str]
) -> "tuple[pa.Field, pa.Array]":
    """The field and the values of a column: with the input's type, or the one that pyarrow finds, or as JSON text."""
    kind = _own_type(arrow, name, arrays)
    if kind is None and schema is not None:
        source = next((found for found in (name, name.removeprefix("input_")) if found in schema.names), None)
        kind = None if source is None else schema.field(source).type
    for chosen in dict.fromkeys((kind, None)):  # a column of responses holds one of them here: another type
        with suppress(arrow.ArrowException, TypeError, ValueError, OverflowError):
            array = arrow.array(values, type=chosen)
            return arrow.field(name, array.type), array
    return arrow.field(name, arrow.string(), metadata=AS_JSON), arrow.array(map(_json, values), arrow.string())


def _own_type(arrow: "ModuleType", name: str, arrays: Sequence[str]) -> "pa.DataType | None":
    kinds = INTEGERS | NUMBERS | {"error": "string"}
    if name in kinds:
        return arrow.type_for_alias(kinds[name])
    if name == "segment_rewards":
        return arrow.list_(arrow.float32())
    if name not in arrays and name not in NESTED:
        return None
    if name in NESTED:
        return arrow.list_(arrow.list_(arrow.type_for_alias(NESTED[name])))
    of = {"token_ids": arrow.int32(), "tokens": arrow.string()}
    return arrow.string() if name == "text" else arrow.list_(of.get(name, arrow.float32()))


def _common(schemas: "Sequence[pa.Schema]") -> "pa.Schema":
    """One schema for all parts."""
    arrow, _ = _libraries()
    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for field in schema:
            before = fields.setdefault(field.name, field)
            if before.equals(field, check_metadata=True):
                continue
            try:
                if AS_JSON in (_marks(before), _marks(field)):
                    raise arrow.ArrowTypeError("one is JSON text")
                both = [arrow.schema([before]), arrow.schema([field])]
                fields[field.name] = arrow.unify_schemas(both, promote_options="permissive").field(0)
            except (arrow.ArrowTypeError, arrow.ArrowInvalid):
                fields[field.name] = arrow.field(field.name, arrow.string(), metadata=AS_JSON)
    return arrow.schema(list(fields.values()))


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
            columns.append(column.cast(field.type))
    return arrow.table(columns, schema=schema)


def _marks(field: "pa.Field") -> dict[bytes, bytes]:
    return {name: value for name, value in (field.metadata or {}).items() if name in AS_JSON}


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, default=str)
