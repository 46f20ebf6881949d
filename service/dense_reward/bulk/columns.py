"""Columns of the input -> the item that is scored, and its scores -> the columns of the output. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from dense_reward.bulk.records import Cells, Faulty, Outcome, SourceRow
from dense_reward.errors import SettingsError
from dense_reward.schemas import FORM_FIELDS, Item

FIELDS = FORM_FIELDS | {"candidate_ids", "segments"}
FOUND_BY_NAME = tuple(sorted(FIELDS - {"score"}))
"""Columns that are read without --columns. `score` is not: it often holds a rating; --turns replaces it."""
OWN_COLUMNS = (
    "row",
    "reward",
    "tokens",
    "response_index",
    "error",
    "sum",
    "mean",
    "min",
    "length",
    "candidate_reward",
    "segment_rewards",
)
"""Names that no column of the input keeps, because `stats` reads them; those of --include come in addition."""
FLAT = {"response_ids": 1, "candidate_ids": 2, "segments": 2}
"""Levels of lists of a field that has the values of one response only."""
PER_RESPONSE = ("responses", *FLAT)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds which field of an item. Without a mapping, columns are found by the names of the fields.

    `turns`: which assistant messages of a chat are scored. `arrays`: the columns that scoring adds per token.
    `typed`: the input has types, as Parquet has. An object then has all keys of all rows, and null where it had none.
    """

    mapping: Mapping[str, str]
    turns: Literal["last", "all_assistant"]
    arrays: Sequence[str]
    typed: bool = False

    def items(self, cells: Cells) -> list[Item] | Faulty:
        """The items of a row, or why it has none: one, or a chat for each response to a prompt of messages."""
        fields = self._fields(cells)
        if isinstance(fields, Faulty):
            return fields
        if not _is_unicode(fields):
            return Faulty("a text has a lone surrogate, which is not a Unicode character: remove it")
        try:
            return [Item.model_validate(each) for each in _of_messages(_per_response(fields), self.turns)]
        except ValidationError as error:
            detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, detail["loc"]))
            reason = f"{place}: {detail['msg']}" if place else detail["msg"].removeprefix("Value error, ")
        except ValueError as error:
            reason = str(error)
        return Faulty(f"{reason} (its columns are {_listed(cells)}; --columns FIELD=COLUMN,... chooses them)")

    def output_rows(self, row: SourceRow, outcome: Outcome) -> Iterator[Cells]:
        """One row for each response, or one with the error. The input's columns come first."""
        if isinstance(outcome, Faulty):
            message = outcome.message.encode("utf-8", "backslashreplace").decode()  # it can name a column
            yield self._kept(row, None) | {"row": row.number, "error": message}
            return
        for index, response in enumerate(outcome):
            own = {"row": row.number, "response_index": index, "error": None}
            yield self._kept(row, index) | own | dict(response)

    def _fields(self, cells: Cells) -> Cells | Faulty:
        if not self.mapping:
            return self._given({name: cells[name] for name in FOUND_BY_NAME if name in cells})
        missing = sorted(column for column in self.mapping.values() if column not in cells)
        if missing:
            return Faulty(f"there is no column {missing[0]!r}: this row has {_listed(cells)}; correct --columns")
        return self._given({field: cells[column] for field, column in self.mapping.items()})

    def _given(self, fields: Cells) -> Cells:
        """The fields that are not null; a chat template would see the null keys in objects of a typed input."""
        given = {name: value for name, value in fields.items() if value is not None}
        return {name: _without_null_keys(value) for name, value in given.items()} if self.typed else given

    def kept_name(self, name: str) -> str:
        """The output's name of a column of the input: input_NAME if the output has that name itself.

        `input_` comes before a name of that kind too, whatever the columns of a row: each name has one meaning.
        """
        plain = name
        while plain.startswith("input_"):
            plain = plain.removeprefix("input_")
        return f"input_{name}" if plain in OWN_COLUMNS or plain in self.arrays else name

    def _kept(self, row: SourceRow, index: int | None) -> Cells:
        """The input's columns. A scored column with values of several responses keeps those of this one."""
        scored = {self.mapping.get(field) if self.mapping else field: field for field in PER_RESPONSE}
        kept: Cells = {}
        for name, value in row.cells.items():
            field = scored.get(name)
            divided = index is not None and field is not None and isinstance(value, list) and not _is_flat(field, value)
            kept[self.kept_name(name)] = value[index] if divided else value
        return kept


def parse_columns(text: str | None) -> dict[str, str]:
    """The mapping of "prompt=question,response=answer". Raises SettingsError."""
    mapping: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or field not in FIELDS:
            known = ", ".join(sorted(FIELDS))
            raise SettingsError(f"--columns {part!r} is not FIELD=COLUMN; the fields are {known}")
        if field in mapping:
            raise SettingsError(f"--columns names {field} twice: give each field one column")
        mapping[field] = column
    return mapping


def weight(value: object) -> int:
    """About how many characters of text a value stands for; an id counts as 4."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(weight, value.values()))
    if isinstance(value, list | tuple):
        return 4 * len(value) if value and isinstance(value[0], int) else sum(map(weight, value))
    return 4


def _per_response(fields: Cells) -> Cells:
    """A flat list of ids or spans is that of the only response."""
    flat = {name: [fields[name]] for name in FLAT if name in fields and _is_flat(name, fields[name])}
    return fields | flat


def _of_messages(fields: Cells, turns: str) -> Iterator[Cells]:
    """A prompt that is a list of messages becomes a chat with each response at its end. Raises ValueError."""
    if isinstance(fields.get("messages"), list) and "score" not in fields:
        fields = {**fields, "score": turns}
    if not isinstance(fields.get("prompt"), list):
        yield fields
        return
    given = [fields[name] for name in ("response", "responses") if name in fields]
    if len(given) != 1 or ("responses" in fields and not (isinstance(given[0], list) and given[0])):
        raise ValueError("a prompt of messages needs either response, or responses as a list")
    answers = given[0] if "responses" in fields else given
    rest = {name: value for name, value in fields.items() if name not in {"prompt", "response", "responses"}}
    for name in rest.keys() & FLAT.keys():
        if not isinstance(rest[name], list) or len(rest[name]) != len(answers):
            raise ValueError(f"{name} must have one entry for each of the {len(answers)} responses")
    for index, answer in enumerate(answers):
        own = {name: [rest[name][index]] for name in rest.keys() & FLAT.keys()}
        # A list is of messages: TRL's completions are.
        turn = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        yield {"score": turns, **rest, **own, "messages": [*fields["prompt"], *turn]}


def _without_null_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_null_keys(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return list(map(_without_null_keys, value))
    return value


def _is_unicode(value: object) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(map(_is_unicode, (*value, *value.values())))
    return not isinstance(value, list) or all(map(_is_unicode, value))


def _is_flat(field: str, value: object) -> bool:
    """Whether a field has the values of one response, not a list of those of each. An empty list is of one."""
    depth = FLAT.get(field)
    return isinstance(value, list) and depth is not None and (value == [] or _depth(value) == depth)


def _depth(value: object) -> int | None:
    """Levels of lists around the first number; None without a number."""
    if isinstance(value, list):
        return next((depth + 1 for depth in map(_depth, value) if depth is not None), None)
    return 0 if isinstance(value, int) else None


def _listed(cells: Cells) -> str:
    return ", ".join(cells) or "empty"
