"""Any result of a job, which is JSON, as tables: named records become rows, estimates one cell. Pure functions.

A value is drawn by its form, not by its name, so that a new job needs nothing here:

- {value, low, high} and {value, standard_error, ...} are one cell, `0.81 [0.75, 0.86]` or `0.81 ± 0.01`;
- records of a list, or of an object by name, are the rows of a table if all their fields are cells;
- anything else is a list of fields, a record of at most four among them, and a section for each other part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Json = object
MAX_COLUMNS, MAX_VALUES, MAX_FIELDS = 14, 8, 4
NONE = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """`path`: the keys that lead to it. Every row has as many cells as `titles`."""

    path: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(value: Json, path: tuple[str, ...] = ()) -> Iterator[Table]:
    """The tables of a value, in its own order."""
    records = _named(value)
    if records and all(isinstance(one, Mapping) for _, one in records):
        rows = [(name, _cells(one)) for name, one in records if isinstance(one, Mapping)]
        titles = tuple(dict.fromkeys(title for _, cells in rows for title in cells or {}))
        if all(cells is not None for _, cells in rows) and len(titles) <= MAX_COLUMNS:
            found = tuple((name, *((cells or {}).get(title, NONE) for title in titles)) for name, cells in rows)
            yield Table(path, ("", *titles), found)
            return
    fields = {name: _few(name, one) for name, one in records}
    own = tuple(field for found in fields.values() for field in found.items())
    if own:
        yield Table(path, ("", "value"), own)
    for name, one in records:
        if not fields[name]:
            yield from tables_of(one, (*path, name))


def _named(value: Json) -> list[tuple[str, Json]]:
    """The parts of a value with their names; those of a list are named by their own `name`, or counted from 1."""
    if isinstance(value, Mapping):
        return [(str(name), one) for name, one in value.items()]
    if isinstance(value, list):
        return [(_name(one, str(index)), one) for index, one in enumerate(value, 1)]
    return [("", value)]


def _name(value: Json, otherwise: str) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else otherwise


def _few(name: str, value: Json) -> dict[str, str]:
    """A value as a few fields of the record that it is in; nothing if it needs a section."""
    cell = _cell(value)
    if cell is not None:
        return {name: cell}
    if not isinstance(value, Mapping) or len(value) > MAX_FIELDS:
        return {}
    cells = {f"{name}.{inner}": _cell(one) for inner, one in value.items()}
    return {title: cell for title, cell in cells.items() if cell is not None} if None not in cells.values() else {}


def _cells(record: Mapping[str, Json], prefix: str = "") -> dict[str, str] | None:
    """A record as cells by title; a record inside it by `outer.inner`; None if a part of it is no cell."""
    found: dict[str, str] = {}
    for name, value in record.items():
        cell = _cell(value)
        inner = _cells(value, f"{prefix}{name}.") if cell is None and isinstance(value, Mapping) else None
        if cell is not None:
            found[f"{prefix}{name}"] = cell
        elif inner is not None:
            found |= inner
        else:
            return None
    return found


def _cell(value: Json) -> str | None:
    """One cell; None for a value that needs several."""
    cell: str | None = None
    match value:
        case bool() | str():
            cell = str(value)
        case int() | float():
            cell = number(value)
        case {"value": int() | float() as mean, "low": low, "high": high}:
            cell = f"{number(mean)} [{_cell(low)}, {_cell(high)}]"
        case {"value": int() | float() as mean, "standard_error": error}:
            cell = number(mean) + ("" if error is None else f" ± {_cell(error)}")
        case list() if value and all(isinstance(one, str | int | float) for one in value):
            cell = _values(value)
        case _ if not value:
            cell = NONE
    return cell


def _values(values: Sequence[str | float]) -> str:
    shown = ", ".join(one if isinstance(one, str) else number(one) for one in values[:MAX_VALUES])
    return shown + (f", … ({len(values)} values)" if len(values) > MAX_VALUES else "")


def number(value: float) -> str:
    """Four significant digits; integers whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
