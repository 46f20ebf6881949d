"""Loads demonstrations from a file, a `datasets` data set or the arithmetic generator, and splits them.

Every job loads its demonstrations here. A line that is not a demonstration is an error, or is counted as skipped.
Must not import tokenizers, chat templates or models.
"""

import codecs
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dense_reward_trainer.data.arithmetic import ArithmeticOptions, generate
from dense_reward_trainer.data.demonstration import (
    ChatMessage,
    ChatRole,
    Demonstration,
    LineError,
    RawRow,
    Reason,
    parse_line,
    read_row,
)
from dense_reward_trainer.data.final_answers import final_answer, normalise_number

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

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FILE_SUFFIXES = frozenset((".jsonl", ".json", ".gz", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".zst", ".zip"))
_SOURCES = "a .jsonl or .jsonl.gz file, a data set such as openai/gsm8k:main@train, or the generator `arithmetic`"
_LISTED_BAD_LINES = 10
# --skip-bad exists for every job that has a data source. A file to evaluate on is not a data source.
SKIP_BAD = "Correct them, or leave them out: add --skip-bad to the command."
NO_SKIP = "Correct or remove them: lines of a file to measure on are never skipped."


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a demonstration: its place (lines count from 1), the kind of fault, and the detail."""

    file: str
    line: int
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """The demonstrations of a source in its order, and the bad lines that were left out."""

    demonstrations: tuple[Demonstration, ...]
    skipped: tuple[BadLine, ...]

    @property
    def skipped_by_reason(self) -> dict[Reason, int]:
        """Number of skipped lines for each reason, the most frequent first."""
        return dict(Counter(bad.reason for bad in self.skipped).most_common())


@dataclass(frozen=True, slots=True)
class Split:
    """Demonstrations to train on and to evaluate on, in the order of the source. No prompt is in both parts."""

    train: tuple[Demonstration, ...]
    held_out: tuple[Demonstration, ...]


class DataError(ValueError):
    """A source cannot be used. `bad_lines`: the lines that are not demonstrations, if these are the reason."""

    def __init__(self, message: str, bad_lines: Sequence[BadLine] = ()) -> None:
        super().__init__(message)
        self.bad_lines = tuple(bad_lines)


class DataSource(BaseModel):
    """Where a job loads demonstrations from, and how it splits them into training and held-out ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="`arithmetic`, the path of a .jsonl or .jsonl.gz file, or a data set as name[:config][@split] (the "
        "split is `train` by default).",
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
                f"`arithmetic` was given for the source {self.source!r}, which does not use it: remove it, "
                "or set source to `arithmetic`"
            )
        return self


class DatasetRows(Protocol):
    """A data set: its length, and one mapping of columns to values for each row."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[RawRow]: ...


OpenDataset = Callable[[str, str | None, str], DatasetRows]


def open_dataset(name: str, config: str | None, split: str) -> DatasetRows:
    """`datasets.load_dataset` for one split. Raises DataError with the library's message if that fails."""
    import datasets  # noqa: PLC0415  (slow, and only needed for this source)

    try:
        return cast(DatasetRows, datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is not a file, and as a data set (configuration {config or 'default'}, split {split}) it "
            f"could not be loaded: {error}. A source is {_SOURCES}"
        ) from error


def load(source: DataSource, opener: OpenDataset = open_dataset, *, cure: str = SKIP_BAD) -> LoadedRows:
    """All demonstrations of a source. Blank lines of a file do not count; rows of a data set are numbered from 1.

    Raises DataError if the source cannot be read, a line is bad (unless `skip_bad`), or no demonstration is left.
    `cure`: the last line of the error for bad lines, which depends on the job.
    """
    total, rows = _numbered_rows(source, opener)
    end = max(total - source.skip_last, 0)
    start = 0 if source.last is None else max(end - source.last, 0)
    kept = end - start if source.limit is None else min(end - start, source.limit)
    demonstrations: list[Demonstration] = []
    bad: list[BadLine] = []
    for number, raw in islice(rows, start, start + kept):
        try:
            row = parse_line(raw) if isinstance(raw, bytes) else raw
            demonstrations.append(read_row(row, f"{source.source}:{number}", source.strip_annotations))
        except LineError as error:
            bad.append(BadLine(source.source, number, error.reason, error.detail))
    report = _bad_line_report(source.source, bad, kept)
    if bad and not source.skip_bad:
        raise DataError(f"{report}\n{cure}", bad)
    if not demonstrations:
        within = f"limit {source.limit} and skip_last {source.skip_last} leave {kept} of {total} lines"
        raise DataError(f"{source.source}: nothing to learn from: {within}\n{report}", bad)
    return LoadedRows(tuple(demonstrations), tuple(bad))


def _bad_line_report(source: str, bad: Sequence[BadLine], total: int) -> str:
    listed = [f"  {line}" for line in bad[:_LISTED_BAD_LINES]]
    more = [f"  and {len(bad) - len(listed)} more"] if len(bad) > len(listed) else []
    return "\n".join([f"{source}: {len(bad)} of {total} lines are not demonstrations:", *listed, *more])


def _numbered_rows(source: DataSource, opener: OpenDataset) -> tuple[int, Iterable[tuple[int, bytes | RawRow]]]:
    if source.arithmetic is not None:
        problems = generate(source.arithmetic)
        # Label noise only changes the response; the stated answer stays right.
        rows = ({"prompt": p.prompt, "response": p.response, "final_answer": p.answer} for p in problems)
        return len(problems), enumerate(rows, 1)
    path = Path(source.source).expanduser()
    if path.exists():
        lines = _file_lines(path)
        return len(lines), lines
    _refuse_missing_file(source.source, path)
    dataset = opener(*_dataset_name(source.source))
    return len(dataset), enumerate(dataset, 1)


def _refuse_missing_file(source: str, path: Path) -> None:
    local = source.startswith(("/", "./", "../", "~")) or ("/" in source and path.parent.is_dir())
    if path.suffix in _FILE_SUFFIXES or (local and "@" not in source):
        raise DataError(
            f"{source}: there is no such file. It looks like a path, so it was not searched for as a data set. "
            f"Correct the path, or name the split of a data set: name@train. A source is {_SOURCES}"
        )


def _dataset_name(source: str) -> tuple[str, str | None, str]:
    name_and_config, _, part = source.rpartition("@") if "@" in source else (source, "", "train")
    name, colon, config = name_and_config.partition(":")
    if not name or not part or (colon and not config):
        raise DataError(f"{source!r} does not name a data set: write name[:config][@split]. A source is {_SOURCES}")
    return name, config or None, part


def _file_lines(path: Path) -> list[tuple[int, bytes]]:
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: name a .jsonl file in it, or write {path}@train to load it with `datasets`"
        )
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path}: only .jsonl and .jsonl.gz files are read: convert it to one JSON object per line")
    content = path.read_bytes()
    if content.startswith(_LFS_POINTER):
        raise DataError(
            f"{path} is a git-lfs pointer, not the data: run `git lfs pull` in its repository, or download the file "
            "again"
        )
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: not a complete gzip file ({error}): copy or compress it again") from error
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


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
    digest = hashlib.sha256(_canonical([seed, _role_content_pairs(demonstration.prompt_messages)])).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def data_sha256(demonstrations: Iterable[Demonstration]) -> str:
    """Hex hash of messages and answers in order, without the places that they were loaded from."""
    digest = hashlib.sha256()
    for demonstration in demonstrations:
        digest.update(_canonical([_role_content_pairs(demonstration.messages), demonstration.answer]) + b"\n")
    return digest.hexdigest()


def _role_content_pairs(messages: Iterable[ChatMessage]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _canonical(value: list[object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
