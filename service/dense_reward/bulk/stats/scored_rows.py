"""Reads outputs of bulk scoring, in constant memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dense_reward.bulk.run_state import state_of
from dense_reward.bulk.sources import library
from dense_reward.errors import BulkError
from dense_reward.records import FloatArray

READ = ("row", "response_index", "reward", "tokens", "error")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One response. `tokens` is None if the file has none. A reward that the file has no number for is NaN."""

    file: Path
    row: int
    response_index: int
    reward_S: FloatArray
    tokens: Sequence[str] | None


def scored_rows(file: Path) -> Iterator[ScoredRow | None]:
    """The responses of a file; None for a row with an error. Raises BulkError if `score` did not write the file."""
    for cells in _cells(file):
        yield None if not cells.get("reward") and cells.get("error") else _scored_row(file, cells)


def incomplete(file: Path) -> str | None:
    """What is missing of an output that is not complete. Raises SettingsError if its state cannot be read."""
    state = state_of(file)
    if state is None or state.done:
        return None
    if file.suffix == ".parquet":
        raise BulkError(f"{file} is not complete: run its dense-reward score command again")
    return f"{file} is not complete: the statistics are of its first {state.rows} rows"


def _scored_row(file: Path, cells: Mapping[str, Any]) -> ScoredRow:
    reward, tokens, row, index = (cells.get(name) for name in ("reward", "tokens", "row", "response_index"))
    if reward is None or row is None:
        raise BulkError(f"{file} has no rewards: name an output of dense-reward score whose --include has reward")
    place = f"{file}: row {row}"
    if not isinstance(row, int) or not isinstance(index, int | None) or not isinstance(reward, list):
        raise BulkError(f"{place} is not of dense-reward score, whose rewards are lists: name an output of it")
    try:
        reward_S = np.array(reward, np.float32)
    except (TypeError, ValueError):
        reward_S = np.empty((0, 0), np.float32)
    if reward_S.ndim != 1:
        raise BulkError(f"{place} has a reward that is not a list of numbers: name an output of dense-reward score")
    if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise BulkError(f"{place} has tokens that are not a list of texts: name an output of dense-reward score")
    if tokens is not None and len(tokens) != len(reward):
        raise BulkError(f"{place} has {len(tokens)} tokens and {len(reward)} rewards: score it again")
    return ScoredRow(file, row, index or 0, reward_S, tokens)


def _cells(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise BulkError(f"{file}: no such file: name outputs of dense-reward score")
    if file.suffix == ".parquet":
        yield from _parquet_cells(file)
        return
    limit, read = safe_bytes(file), 0
    with _readable(file) as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            if limit is not None and read > limit:
                return
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError):
                raise BulkError(
                    f"{file}: line {number} is cut or no JSON: run its dense-reward score command again"
                ) from None
            if not isinstance(cells, dict):
                raise BulkError(f"{file}: line {number} is no JSON object: name an output of dense-reward score")
            yield cells


def _readable(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise BulkError(f"{file} cannot be read ({error.strerror}): correct its permissions") from None


def safe_bytes(file: Path) -> int | None:
    """How much of an output that is not complete is written safely; None for a complete file."""
    state = state_of(file)
    return None if state is None or state.done else state.written.get("bytes", 0)


def _parquet_cells(file: Path) -> Iterator[dict[str, Any]]:
    parquet, arrow = library("pyarrow.parquet", "a Parquet file"), library("pyarrow", "a Parquet file")
    try:
        with parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True) as opened:
            present = [name for name in READ if name in opened.schema_arrow.names]
            if not {"row", "reward"} <= set(present):
                raise BulkError(
                    f"{file} has no rewards: name an output of dense-reward score whose --include has reward"
                )
            for batch in opened.iter_batches(256, columns=present):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BulkError(f"{file} cannot be read as Parquet ({reason}): score it again") from None
