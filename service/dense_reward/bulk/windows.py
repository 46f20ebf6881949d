"""Cuts an input into windows, and scores several windows at the same time, in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dense_reward.bulk.columns import Columns, weight
from dense_reward.bulk.records import Faulty, Outcome, Position, Scored, Scorer, Source, SourceRow, Window
from dense_reward.errors import BulkError
from dense_reward.schemas import Item

SHARD_ROWS = 64
"""Neighbouring rows of one shard: rows that share a prompt are usually neighbours, and computed together."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `of`-th block of SHARD_ROWS rows, beginning with block `index`, from 1."""

    index: int = 1
    of: int = 1

    def holds(self, row: int) -> bool:
        return (row // SHARD_ROWS) % self.of == self.index - 1

    def rows(self, total: int) -> int:
        """How many of the first `total` rows it holds."""
        blocks, rest = divmod(total, SHARD_ROWS)
        whole = (blocks - self.index) // self.of + 1 if blocks >= self.index else 0
        return whole * SHARD_ROWS + (rest if self.holds(blocks * SHARD_ROWS) else 0)


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A window ends at either limit; `characters` counts an id as 4.

    The first `stagger` windows are smaller, so that windows that are computed together do not all end together.
    """

    rows: int
    characters: int
    stagger: int = 1

    def of(self, index: int) -> tuple[int, int]:
        share = min(1.0, (index + 1) / self.stagger)
        return max(1, int(self.rows * share)), max(1, int(self.characters * share))


def windows(source: Source, start: Position, shard: Shard, size: WindowSize) -> Iterator[Window]:
    """The rows of a shard from a position on. The last window can be empty: it ends where the input does.

    Raises BulkError if the input cannot be read further, after a window of the rows before that.
    """
    held: list[SourceRow] = []
    index, characters, end = 0, 0, start
    rows_limit, characters_limit = size.of(0)
    try:
        for row in source.rows(start):
            end = row.end
            if not shard.holds(row.number):
                continue
            held.append(row)
            characters += weight(row.cells)
            if len(held) >= rows_limit or characters >= characters_limit:
                yield Window(held, end)
                index, held, characters = index + 1, [], 0
                rows_limit, characters_limit = size.of(index)
    except BulkError:
        yield Window(held, end)
        raise
    yield Window(held, end)


async def scored_in_order(cut: Iterator[Window], columns: Columns, scorer: Scorer) -> AsyncGenerator[Scored, None]:
    """The windows with their outcomes, in order, while up to `scorer.parallel` windows are scored.

    Raises BulkError. The windows before the one at fault have been yielded then.
    """
    waiting: deque[asyncio.Task[Scored]] = deque()
    try:
        more, unreadable = True, None
        while more or waiting:
            while more and len(waiting) < scorer.parallel:
                try:
                    window = await asyncio.to_thread(next, cut, None)
                except BulkError as error:
                    window, unreadable = None, error
                more = window is not None
                if window is not None:
                    waiting.append(asyncio.create_task(score_window(window, columns, scorer)))
            if waiting:
                yield await waiting.popleft()
        if unreadable is not None:
            raise unreadable
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def score_window(window: Window, columns: Columns, scorer: Scorer) -> Scored:
    """Score the rows that have items; the others keep their faults."""
    found = [Faulty(row.fault) if row.fault is not None else columns.items(row.cells) for row in window.rows]
    items = [item for each in found if not isinstance(each, Faulty) for item in each]
    scored, tokens = await scorer.score(items) if items else ([], 0)
    if len(scored) != len(items):
        raise ValueError(f"{len(scored)} outcomes of {len(items)} items: scores would reach other rows")
    rest = iter(scored)
    return Scored(
        window,
        [each if isinstance(each, Faulty) else _together(list(islice(rest, len(each)))) for each in found],
        tokens,
    )


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """The responses of a row's items, or the first fault."""
    fault = next((outcome for outcome in outcomes if isinstance(outcome, Faulty)), None)
    return fault or [response for outcome in outcomes if not isinstance(outcome, Faulty) for response in outcome]


class PartFailedError(Exception):
    """Items were refused together although some of them may be accepted alone."""


async def halved_if_refused(
    items: Sequence[Item], score: Callable[[Sequence[Item]], Awaitable[tuple[list[Outcome], int]]]
) -> tuple[list[Outcome], int]:
    """Score items, and again in halves if they are refused together. Only the item at fault gets a fault."""
    try:
        return await score(items)
    except PartFailedError as error:
        if len(items) == 1:
            return [Faulty(str(error))], 0
    middle = len(items) // 2
    first, first_tokens = await halved_if_refused(items[:middle], score)
    second, second_tokens = await halved_if_refused(items[middle:], score)
    return [*first, *second], first_tokens + second_tokens
