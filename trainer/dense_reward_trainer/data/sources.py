"""Loads demonstrations from a file, a `datasets` data set or the arithmetic generator, and splits them.

Every job loads its demonstrations here. A line that is not a demonstration is an error, or is counted as skipped.
Must not import tokenizers, chat templates or models.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dense_reward_trainer.data.arithmetic import ArithmeticOptions, generate
from dense_reward_trainer.data.data_sets import (
    SOURCES,
    OpenDataset,
    dataset_conversion,
    dataset_name,
    open_dataset,
)
from dense_reward_trainer.data.demonstration import Reading, parse_line, read_row
from dense_reward_trainer.data.file_rows import file_rows
from dense_reward_trainer.data.final_answers import final_answer, normalise_number
from dense_reward_trainer.data.records import (
    BadLine,
    ChatMessage,
    ChatRole,
    DataError,
    Demonstration,
    LineError,
    RawRow,
    Reason,
)
from dense_reward_trainer.data.row_values import without_nulls

__all__ = [
    "NO_SKIP",
    "SKIP_BAD",
    "ArithmeticOptions",
    "BadLine",
    "ChatMessage",
    "ChatRole",
    "DataError",
    "DataSource",
    "Demonstration",
    "LoadedRows",
    "Split",
    "data_sha256",
    "final_answer",
    "load",
    "normalise_number",
    "open_dataset",
    "split",
]

_FILE_SUFFIXES = frozenset((".jsonl", ".json", ".gz", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".zst", ".zip"))
_LISTED_BAD_LINES, _LISTED_CONVERSIONS = 10, 3
_PAGE = "docs/data.md"
# --skip-bad exists for every job that has a data source. A file to evaluate on is not a data source.
SKIP_BAD = "Correct them, or leave them out: add --skip-bad to the command."
_ALL_BAD = "Every line is bad: correct or convert the source."
NO_SKIP = "Correct or remove them: lines of a file to measure on are never skipped."


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """The demonstrations of a source in its order, the bad lines that were left out, and how the rows were read.

    `data_set`: what `source` stands for, with its configuration and split, if it is a data set.
    `layouts`: number of rows for each layout. `notes`: what is to be said about a layout. `not_read`: for each column
    with content that is not read, the number of rows that have it.
    """

    source: str
    demonstrations: tuple[Demonstration, ...]
    skipped: tuple[BadLine, ...]
    layouts: Mapping[str, int]
    notes: tuple[str, ...]
    not_read: Mapping[str, int]
    data_set: str = ""

    @property
    def skipped_by_reason(self) -> dict[Reason, int]:
        """Number of skipped lines for each reason, the most frequent first."""
        return dict(Counter(bad.reason for bad in self.skipped).most_common())

    @property
    def summary(self) -> str:
        """What was read and what was not, one line each: the first lines of every run."""
        rows = len(self.demonstrations)
        read = ", ".join(name if count == rows else f"{name} ({count})" for name, count in self.layouts.items())
        columns = [
            name if count == rows else f"{name} (in {count} of {rows} rows)" for name, count in self.not_read.items()
        ]
        place = self.source if self.data_set in ("", self.source) else f"{self.source} ({self.data_set})"
        lines = [f"{place}: {rows} rows read as {'; '.join([read, *self.notes])}"]
        lines += [f"columns not read: {', '.join(columns)}"] if columns else []
        lines += [f"left out {len(self.skipped)} bad lines: {self.skipped_by_reason}"] if self.skipped else []
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Split:
    """Demonstrations to train on and to evaluate on, in the order of the source. No prompt is in both parts."""

    train: tuple[Demonstration, ...]
    held_out: tuple[Demonstration, ...]


class DataSource(BaseModel):
    """Where a job loads demonstrations from, and how it splits them into training and held-out ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="`arithmetic`, the path of a .jsonl, .json (plain or .gz) or .parquet file, or a data set as "
        "name[:config][@split] (the split is `train` by default) or by its short name, such as gsm8k or ultrachat200k.",
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first `limit` lines; null: all.")
    skip_last: int = Field(
        default=0, ge=0, description="Ignore the last `skip_last` lines; applied before `last` and `limit`."
    )
    last: int | None = Field(
        default=None,
        ge=1,
        description="Use only the last `last` of the lines that skip_last leaves; applied before `limit`. null: all.",
    )
    skip_bad: bool = Field(
        default=False,
        description="Skip lines that are not demonstrations, and report how many, instead of refusing the source.",
    )
    ignore_columns: tuple[str, ...] | None = Field(
        default=None, description="Columns to ignore, although their names say that they are part of the prompt."
    )
    strip_annotations: bool = Field(
        default=False, description="Remove calculator annotations such as <<48/2=24>> from the responses."
    )
    held_out_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Fraction of the distinct prompts that are held out, in expectation."
    )
    seed: int = Field(default=0, description="Seed of the split into training and held-out prompts.")
    arithmetic: ArithmeticOptions | None = Field(
        default=None, description="Problems to generate; only for the source `arithmetic`."
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_arithmetic(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("source") == "arithmetic" and values.get("arithmetic") is None:
            return {**values, "arithmetic": {}}
        return values

    @model_validator(mode="after")
    def _arithmetic_has_its_source(self) -> Self:
        if self.arithmetic is not None and self.source != "arithmetic":
            raise ValueError(
                f"`arithmetic` was given for the source {self.source!r}, which does not use it: set "
                "it to null (arithmetic=null), or source to `arithmetic`"
            )
        return self


@dataclass(frozen=True, slots=True)
class _NumberedRows:
    """The rows of a source, all of them, with their numbers.

    `data_set`: the whole name of a data set, "" for other sources. `note`: what a user must know if some rows are bad.
    `conversion`: the shell command for a Python expression over `rows`.
    """

    total: int
    rows: Iterable[tuple[int, bytes | RawRow]]
    data_set: str = ""
    note: str = ""
    conversion: Callable[[str], str] = str


def load(
    source: DataSource, opener: OpenDataset = open_dataset, *, cure: str = SKIP_BAD, prompts_only: bool = False
) -> LoadedRows:
    """All demonstrations of a source. Blank lines of a file do not count; rows of a data set are numbered from 1.

    Raises DataError if the source cannot be read, a line is bad (unless `skip_bad`), or no demonstration is left.
    `cure`: the last line of the error for bad lines, which depends on the job. `prompts_only`: rows without a response
    are read too; their response is "".
    """
    numbered = _numbered_rows(source, opener)
    total = numbered.total
    end = max(total - source.skip_last, 0)
    start = 0 if source.last is None else max(end - source.last, 0)
    kept = end - start if source.limit is None else min(end - start, source.limit)
    readings: list[Reading] = []
    bad: list[BadLine] = []
    for number, raw in islice(numbered.rows, start, start + kept):
        try:
            readings.append(_reading(source, number, raw, prompts_only))
        except LineError as error:
            bad.append(BadLine(source.source, number, error.reason, error.detail, error.conversion))
    report = _bad_line_report(source.source, bad, kept, numbered)
    if bad and not source.skip_bad:
        raise DataError(f"{report}\n{_ALL_BAD if cure == SKIP_BAD and not readings else cure}", bad)
    if not readings:
        within = f"limit {source.limit} and skip_last {source.skip_last} leave {kept} of {total} lines"
        raise DataError(f"{source.source}: nothing to learn from: {within}\n{report}", bad)
    return LoadedRows(
        source.source,
        tuple(reading.demonstration for reading in readings),
        tuple(bad),
        Counter(reading.layout for reading in readings),
        tuple(dict.fromkeys(reading.note for reading in readings if reading.note)),
        Counter(column for reading in readings for column in reading.not_read),
        numbered.data_set,
    )


def _reading(source: DataSource, number: int, raw: bytes | RawRow, prompts_only: bool) -> Reading:
    row = parse_line(raw) if isinstance(raw, bytes) else raw
    ignored = source.ignore_columns or ()
    return read_row(
        {key: value for key, value in row.items() if key not in ignored},
        f"{source.source}:{number}",
        strip_annotations=source.strip_annotations,
        prompts_only=prompts_only,
    )


def _bad_line_report(source: str, bad: Sequence[BadLine], total: int, numbered: _NumberedRows) -> str:
    header = [numbered.note] if numbered.note and any(line.reason == "not UTF-8" for line in bad) else []
    listed = [f"  {line}" for line in bad[:_LISTED_BAD_LINES]]
    more = [f"  and {len(bad) - len(listed)} more"] if len(bad) > len(listed) else []
    conversions = dict.fromkeys(line.conversion for line in bad if line.conversion)
    cures = [f"To convert them: {numbered.conversion(python)}" for python in islice(conversions, _LISTED_CONVERSIONS)]
    cures += [f"{_PAGE} has all layouts."] if conversions or any(line.reason == "unknown keys" for line in bad) else []
    return "\n".join(
        [*header, f"{source}: {len(bad)} of {total} lines are not demonstrations:", *listed, *more, *cures]
    )


def _numbered_rows(source: DataSource, opener: OpenDataset) -> _NumberedRows:
    if source.arithmetic is not None:
        problems = generate(source.arithmetic)
        # Label noise only changes the response; the stated answer stays right.
        problem_rows = ({"prompt": p.prompt, "response": p.response, "final_answer": p.answer} for p in problems)
        return _NumberedRows(len(problems), enumerate(problem_rows, 1))
    path = Path(source.source).expanduser()
    if path.exists():
        found = file_rows(path)
        return _NumberedRows(len(found.rows), found.rows, note=found.note, conversion=found.conversion)
    _refuse_missing_file(source.source, path)
    name = dataset_name(source.source)
    dataset = opener(*name)
    rows = ((number, cast(RawRow, without_nulls(row))) for number, row in enumerate(dataset, 1))
    hub, config, part = name
    full = f"{hub}{f':{config}' if config else ''}@{part}"
    return _NumberedRows(len(dataset), rows, full, conversion=partial(dataset_conversion, *name))


def _refuse_missing_file(source: str, path: Path) -> None:
    local = source.startswith(("/", "./", "../", "~")) or ("/" in source and path.parent.is_dir())
    if path.suffix in _FILE_SUFFIXES or (local and "@" not in source):
        raise DataError(
            f"{source}: there is no such file. It looks like a path, so it was not searched for as a data set. "
            f"Correct the path, or name the split of a data set: name@train. A source is {SOURCES}"
        )


def split(demonstrations: Iterable[Demonstration], held_out_fraction: float, seed: int) -> Split:
    """Splits by prompt: only a seeded hash of the prompt's messages decides the part.

    Therefore a prompt is never in both parts, the part of a demonstration does not depend on the order or on the other
    demonstrations, and a larger fraction only moves prompts from train to held out. The fraction is met in expectation
    only: a small set can leave either part empty. Raises ValueError unless 0 <= held_out_fraction < 1.
    """
    if not 0.0 <= held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction is {held_out_fraction}: it must be at least 0 and below 1")
    train: list[Demonstration] = []
    held_out: list[Demonstration] = []
    for demonstration in demonstrations:
        is_held_out = _prompt_position(demonstration, seed) < held_out_fraction
        (held_out if is_held_out else train).append(demonstration)
    return Split(tuple(train), tuple(held_out))


def _prompt_position(demonstration: Demonstration, seed: int) -> float:
    # In [0, 1]. Rounding can give 1, which is never held out because the fraction is below 1.
    digest = hashlib.sha256(_canonical([seed, _plain(demonstration.prompt_messages), *_tools(demonstration)])).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def data_sha256(demonstrations: Iterable[Demonstration]) -> str:
    """Hex hash of messages and answers in order, without the places that they were loaded from."""
    digest = hashlib.sha256()
    for demonstration in demonstrations:
        values = [_plain(demonstration.messages), demonstration.answer, *_tools(demonstration)]
        digest.update(_canonical(values) + b"\n")
    return digest.hexdigest()


def _plain(messages: Iterable[ChatMessage]) -> list[object]:
    """Role and content of each message, and the other fields only if they are set, so that hashes of chats stay."""
    pairs: list[object] = []
    for message in messages:
        others = {key: value for key, value in message.as_mapping().items() if key not in ("role", "content")}
        others |= {} if message.weight else {"weight": 0}
        pairs.append([message.role, message.content, *([others] if others else [])])
    return pairs


def _tools(demonstration: Demonstration) -> list[object]:
    return [demonstration.tools] if demonstration.tools else []


def _canonical(value: list[object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
