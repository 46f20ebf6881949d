"""Windows of rows, shards, and order."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from bulk_runs import sums_file
from dense_reward.bulk.columns import Columns
from dense_reward.bulk.records import Faulty, Outcome, Position
from dense_reward.bulk.sources import open_source
from dense_reward.bulk.windows import (
    SHARD_ROWS,
    PartFailedError,
    Shard,
    WindowSize,
    halved_if_refused,
    scored_in_order,
    windows,
)
from dense_reward.schemas import Item

COLUMNS = Columns({}, "last", ())


def test_windows_hold_every_row_once_within_both_limits(tmp_path: Path) -> None:
    source = open_source(str(sums_file(tmp_path, 100)))
    by_rows = list(windows(source, Position(), Shard(), WindowSize(30, 10**6)))
    assert [len(window.rows) for window in by_rows] == [30, 30, 30, 10]
    by_characters = list(windows(source, Position(), Shard(), WindowSize(10**6, 50)))
    assert all(len(window.rows) <= 50 / 4 for window in by_characters)
    assert [row.number for window in by_characters for row in window.rows] == list(range(100))
    assert by_rows[-1].end == by_characters[-1].end == Position(100, source.path.stat().st_size)  # type: ignore[attr-defined]


def test_the_first_windows_are_smaller(tmp_path: Path) -> None:
    source = open_source(str(sums_file(tmp_path, 100)))
    cut = windows(source, Position(), Shard(), WindowSize(30, 10**6, stagger=3))
    assert [len(window.rows) for window in cut] == [10, 20, 30, 30, 10]


@pytest.mark.parametrize("total", [0, 1, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_shards_divide_the_rows(total: int, of: int) -> None:
    shards = [Shard(index, of) for index in range(1, of + 1)]
    held = [[row for row in range(total) if shard.holds(row)] for shard in shards]
    assert sorted(row for rows in held for row in rows) == list(range(total))
    assert [shard.rows(total) for shard in shards] == [len(rows) for rows in held]
    assert all(Shard(1, of).holds(row) for row in range(SHARD_ROWS))


class Slow:
    """It scores nothing before `parallel` windows wait together; then later windows are faster."""

    parallel, characters = 3, 100
    identity: Mapping[str, object] = MappingProxyType({})

    def __init__(self) -> None:
        self.together = self.most = 0
        self.filled = asyncio.Event()

    async def score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        self.together += 1
        self.most = max(self.most, self.together)
        if self.together == self.parallel:
            self.filled.set()
        await self.filled.wait()
        for _ in range(1000 // (1 + int(items[0].prompt[:-2] or 0) if items[0].prompt else 1)):
            await asyncio.sleep(0)
        self.together -= 1
        return [[{"prompt": item.prompt}] for item in items], 1

    async def close(self) -> None:
        """It holds nothing."""


def test_windows_come_in_order_and_not_too_many_are_scored_together(tmp_path: Path) -> None:
    source, scorer = open_source(str(sums_file(tmp_path, 40))), Slow()

    async def numbers() -> list[object]:
        cut = windows(source, Position(), Shard(), WindowSize(4, 10**6))
        found = [scored async for scored in scored_in_order(cut, COLUMNS, scorer)]
        assert all(scored.outcomes[0][0]["prompt"] == f"{scored.window.rows[0].number}+1" for scored in found[:-1])  # type: ignore[index]
        return [row.number for scored in found for row in scored.window.rows]

    assert asyncio.run(asyncio.wait_for(numbers(), 60)) == list(range(40))
    assert scorer.most == scorer.parallel


def test_only_the_item_at_fault_fails() -> None:
    items = [Item.model_validate({"text": str(n)}) for n in range(11)]
    calls = 0

    async def score(part: Sequence[Item]) -> tuple[list[Outcome], int]:
        nonlocal calls
        calls += 1
        if any(item.text == "7" for item in part):
            raise PartFailedError("too large")
        return [[{"text": item.text}] for item in part], len(part)

    found, tokens = asyncio.run(halved_if_refused(items, score))
    assert found[7] == Faulty("too large")
    assert [n for n, outcome in enumerate(found) if outcome == [{"text": str(n)}]] == [*range(7), *range(8, 11)]
    assert tokens == 10
    assert calls < len(items)
