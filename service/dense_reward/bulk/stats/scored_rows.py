"""Reads outputs of bulk scoring, in constant memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dense_reward.bulk.run_state import state_of
from dense_reward.bulk.sources import library
from dense_reward.errors import BulkError
from dense_reward.records import FloatArray

READ = ("row", "response_index", "reward", "tokens", "error")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One response. `tokens` is None if the file has none."""

    file: Path
    row: int
    response_index: int
    reward_S: FloatArray
    tokens: Sequence[str] | None


def scored_rows(file: Path) -> Iterator[ScoredRow | None]:
    """The responses of a file; None for a row with an error. Raises BulkError if `score` did not write the file."""
    for cells in _cells(file):
        if not cells.get("reward") and cells.get("error"):
            yield None
            continue
        reward, tokens = cells.get("reward"), cells.get("tokens")
        if reward is None or "row" not in cells:
            raise BulkError(f"{file} has no rewards: name an output of dense-reward score whose --include has reward")
        if tokens is not None and len(tokens) != len(reward):
            place = f"{file}: row {cells['row']}"
            raise BulkError(f"{place} has {len(tokens)} tokens and {len(reward)} rewards: score it again")
        yield ScoredRow(file, cells["row"], cells.get("response_index") or 0, np.array(reward, np.float32), tokens)


def _cells(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise BulkError(f"{file}: no such file: name outputs of dense-reward score")
    if file.suffix == ".parquet":
        yield from _parquet_cells(file)
        return
    limit, read = safe_bytes(file), 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            if limit is not None and read > limit:
                return
            try:
                cells = json.loads(line)
            except ValueError:
                raise BulkError(
                    f"{file}: line {number} is cut or no JSON: run its dense-reward score command again"
                ) from None
            if not isinstance(cells, dict):
                raise BulkError(f"{file}: line {number} is no JSON object: name an output of dense-reward score")
            yield cells


def safe_bytes(file: Path) -> int | None:
    """How much of an output that is not complete is written safely; None for a complete file."""
    state = state_of(file)
    return None if state is None or state.done else state.written.get("bytes", 0)


def _parquet_cells(file: Path) -> Iterator[dict[str, Any]]:
    parquet, arrow = library("pyarrow.parquet", "a Parquet file"), library("pyarrow", "a Parquet file")
    try:
        with parquet.ParquetFile(file, memory_map=True) as opened:
            present = [name for name in READ if name in opened.schema_arrow.names]
            for batch in opened.iter_batches(256, columns=present):
                yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise BulkError(f"{file} cannot be read as Parquet ({error}): score it again") from None
