"""Columns of the input -> the item that is scored, and its scores -> the columns of the output. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from dense_reward.bulk.records import Cells, Faulty, Outcome, SourceRow
from dense_reward.errors import SettingsError
from dense_reward.schemas import FORM_FIELDS, Item

FOUND_BY_NAME = tuple(sorted((FORM_FIELDS | {"candidate_ids", "segments"}) - {"score"}))
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
PER_RESPONSE = ("responses", "response_ids")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds which field of an item. Without a mapping, columns are found by the names of the fields.

    `turns`: which assistant messages of a chat are scored. `arrays`: the columns that scoring adds per token.
    """

    mapping: Mapping[str, str]
    turns: Literal["last", "all_assistant"]
    arrays: Sequence[str]

    def item(self, cells: Cells) -> Item | Faulty:
        """The item of a row, or why it has none."""
        fields = self._fields(cells)
        if isinstance(fields, Faulty):
            return fields
        if not _is_unicode(fields):
            return Faulty("a text has a lone surrogate, which is not a Unicode character: remove it")
        try:
            return Item.model_validate(_chat_of_prompt(_lists_of_ids(fields), self.turns))
        except ValidationError as error:
            detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, detail["loc"]))
            reason = f"{place}: {detail['msg']}" if place else detail["msg"].removeprefix("Value error, ")
            return Faulty(f"{reason} (its columns are {_listed(cells)}; --columns FIELD=COLUMN,... chooses them)")

    def output_rows(self, row: SourceRow, outcome: Outcome) -> Iterator[Cells]:
        """One row for each response, or one with the error. The input's columns come first."""
        if isinstance(outcome, Faulty):
            yield self._kept(row, None) | {"row": row.number, "error": outcome.message}
            return
        for index, response in enumerate(outcome):
            own = {"row": row.number, "response_index": index, "error": None}
            yield self._kept(row, index) | own | dict(response)

    def _fields(self, cells: Cells) -> Cells | Faulty:
        if not self.mapping:
            return {name: cells[name] for name in FOUND_BY_NAME if cells.get(name) is not None}
        missing = sorted(column for column in self.mapping.values() if column not in cells)
        if missing:
            return Faulty(f"there is no column {missing[0]!r}: this row has {_listed(cells)}; correct --columns")
        return {field: cells[column] for field, column in self.mapping.items() if cells[column] is not None}

    def _kept(self, row: SourceRow, index: int | None) -> Cells:
        """The input's columns, named by `_kept_name`. A scored column of several responses keeps that of this one."""
        scored = {self.mapping.get(field) if self.mapping else field for field in PER_RESPONSE}
        kept: Cells = {}
        for name, value in row.cells.items():
            per_response = index is not None and name in scored and not _is_flat(value)
            kept[self._kept_name(name, row.cells)] = value[index] if per_response else value
        return kept

    def _kept_name(self, name: str, cells: Cells) -> str:
        """input_NAME if the output has that name itself, or gives it to another column."""
        plain = name.removeprefix("input_")
        taken = plain != name and plain in cells and self._kept_name(plain, cells) == name
        return f"input_{name}" if name in OWN_COLUMNS or name in self.arrays or taken else name


def parse_columns(text: str | None) -> dict[str, str]:
    """The mapping of "prompt=question,response=answer". Raises SettingsError."""
    mapping: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or field not in FORM_FIELDS | {"candidate_ids", "segments"}:
            known = ", ".join(sorted(FORM_FIELDS))
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


def _lists_of_ids(fields: Cells) -> Cells:
    """A flat list of ids is the only response."""
    for name, depth in (("response_ids", 1), ("candidate_ids", 2), ("segments", 2)):
        value = fields.get(name)
        if isinstance(value, list) and _depth(value) == depth:
            fields = {**fields, name: [value]}
    return fields


def _chat_of_prompt(fields: Cells, turns: str) -> Cells:
    """A prompt that is a list of messages becomes a chat that ends with the response."""
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("response"), str):
        answer = {"role": "assistant", "content": fields["response"]}
        rest = {name: value for name, value in fields.items() if name not in {"prompt", "response"}}
        fields = {**rest, "messages": [*fields["prompt"], answer]}
    if isinstance(fields.get("messages"), list) and "score" not in fields:
        fields = {**fields, "score": turns}
    return fields


def _is_unicode(value: object) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(map(_is_unicode, (*value, *value.values())))
    return not isinstance(value, list) or not value or isinstance(value[0], int) or all(map(_is_unicode, value))


def _depth(value: object) -> int:
    """Nested lists until the first number: 1 for [3], 2 for [[3]]; an empty list counts as flat."""
    depth = 0
    while isinstance(value, list):
        depth += 1
        if not value:
            break
        value = value[0]
    return depth


def _is_flat(value: object) -> bool:
    return not isinstance(value, list) or (_depth(value) == 1 and not any(isinstance(entry, str) for entry in value))


def _listed(cells: Cells) -> str:
    return ", ".join(cells) or "empty"
