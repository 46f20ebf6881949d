"""Rows of a benchmark's file: JSON Lines, a JSON array or Parquet, as its authors publish it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from dense_reward_trainer.data.file_rows import file_rows
from dense_reward_trainer.data.records import DataError

Row = TypeVar("Row")


def read_rows(path: Path, benchmark: str, parse: Callable[[Mapping[str, object], str], Row]) -> list[Row]:
    """Each row, parsed with its place (`FILE:NUMBER`); `path`: a file, or a folder of .jsonl files.

    Raises DataError, naming the row, if one cannot be parsed: `parse` raises KeyError, TypeError or ValueError.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .jsonl file")
    return [row for file in files for row in _of_file(file, benchmark, parse)]


def _of_file(path: Path, benchmark: str, parse: Callable[[Mapping[str, object], str], Row]) -> Iterator[Row]:
    for number, content in file_rows(path).rows:
        source = f"{path}:{number}"
        try:
            value: object = json.loads(content) if isinstance(content, bytes) else content
            if not isinstance(value, Mapping):
                raise TypeError("it is no object")
            json.dumps(value, ensure_ascii=False, default=str).encode()  # half of a surrogate pair is a ValueError
            yield parse(value, source)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{source} is not a row of {benchmark} ({reason})") from None


def texts(row: Mapping[str, object], key: str) -> tuple[str, ...]:
    """A list of texts. Raises KeyError or TypeError."""
    found = row[key]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TypeError(f"{key} must be a list of texts")
    return tuple(found)


def text(row: Mapping[str, object], key: str) -> str:
    """A text. Raises KeyError or TypeError."""
    found = row[key]
    if not isinstance(found, str):
        raise TypeError(f"{key} must be a text")
    return found
