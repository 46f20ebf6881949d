"""Collects the statistics of scored rows, in constant memory."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dense_reward.bulk.stats.quantiles import Distribution, GroupedValues, Indices
from dense_reward.bulk.stats.scored_rows import ScoredRow
from dense_reward.bulk.stats.token_classes import CLASSES, token_classes

DOUBLINGS = 18
"""Positions and lengths are grouped by powers of 2; the last group has all from 2**17 on."""
TOGETHER = 256
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A span of a response: its mean reward in nats, its tokens [start, end), and its text between its context."""

    mean: float
    file: str
    row: int
    response_index: int
    start: int
    end: int
    before: str | None = None
    text: str | None = None
    after: str | None = None


@dataclass(slots=True)
class Collected:
    """Statistics of all rows that were added. `span` tokens are one span; the `lowest` lowest of them are kept.

    Responses with a reward that is not finite are counted apart, as rows with an error are.
    """

    lowest: int
    span: int
    responses: int = 0
    errors: int = 0
    without_tokens: int = 0
    not_finite: int = 0
    first_not_finite: str | None = None
    by_all: GroupedValues = field(default_factory=lambda: GroupedValues(1))
    by_position: GroupedValues = field(default_factory=lambda: GroupedValues(DOUBLINGS))
    by_class: GroupedValues = field(default_factory=lambda: GroupedValues(len(CLASSES)))
    means_by_length: GroupedValues = field(default_factory=lambda: GroupedValues(DOUBLINGS))
    sums: GroupedValues = field(default_factory=lambda: GroupedValues(1))
    _spans: list[tuple[float, int, Span]] = field(default_factory=list)
    _seen: int = 0

    def add_all(self, rows: Iterable[ScoredRow | None]) -> None:
        held: list[ScoredRow] = []
        for row in rows:
            if row is None:
                self.errors += 1
                continue
            if not np.isfinite(row.reward_S).all():
                self.not_finite += 1
                self.first_not_finite = self.first_not_finite or f"{row.file} row {row.row}"
                continue
            held.append(row)
            if len(held) == TOGETHER:
                self._add(held)
                held = []
        self._add(held)

    @property
    def spans(self) -> list[Span]:
        """The lowest spans, lowest first; at most one of a response."""
        return sorted(span for _, _, span in self._spans)

    @property
    def positions(self) -> list[tuple[str, Distribution]]:
        return _named(self.by_position, [_range(group, first=0) for group in range(DOUBLINGS)])

    @property
    def lengths(self) -> list[tuple[str, Distribution]]:
        return _named(self.means_by_length, [_range(group, first=1) for group in range(DOUBLINGS)])

    @property
    def classes(self) -> list[tuple[str, Distribution]]:
        return _named(self.by_class, list(CLASSES))

    def _add(self, rows: list[ScoredRow]) -> None:
        self.responses += len(rows)
        scored = [row for row in rows if len(row.reward_S)]
        if not scored:
            return
        reward_N = np.concatenate([row.reward_S for row in scored])
        place_N = np.concatenate([np.arange(len(row.reward_S)) for row in scored])
        self.by_all.add(reward_N, np.zeros(len(reward_N), np.int64))
        self.by_position.add(reward_N, _doubling(place_N + 1))
        sums = np.array([row.reward_S.sum(dtype=np.float64) for row in scored])
        lengths = np.array([len(row.reward_S) for row in scored])
        self.sums.add(sums, np.zeros(len(sums), np.int64))
        self.means_by_length.add(sums / lengths, _doubling(lengths))
        self._add_classes(scored)
        for row in scored:
            self._add_lowest(row)

    def _add_classes(self, rows: list[ScoredRow]) -> None:
        with_tokens = [row for row in rows if row.tokens is not None]
        self.without_tokens += len(rows) - len(with_tokens)
        if with_tokens:
            classes_N = np.array([c for row in with_tokens for c in token_classes(row.tokens or ())], np.int64)
            self.by_class.add(np.concatenate([row.reward_S for row in with_tokens]), classes_N)

    def _add_lowest(self, row: ScoredRow) -> None:
        width = min(self.span, len(row.reward_S))
        sums = np.concatenate([np.zeros(1), np.cumsum(row.reward_S, dtype=np.float64)])
        means = (sums[width:] - sums[:-width]) / width
        start = int(means.argmin())
        mean = float(means[start])
        self._seen += 1
        if self.lowest and (len(self._spans) < self.lowest or mean < -self._spans[0][0]):
            entry = (-mean, -self._seen, _span(row, mean, start, start + width))
            (heapq.heappush if len(self._spans) < self.lowest else heapq.heapreplace)(self._spans, entry)


def _span(row: ScoredRow, mean: float, start: int, end: int) -> Span:
    place = (mean, str(row.file), row.row, row.response_index, start, end)
    if row.tokens is None:
        return Span(*place)
    before = "".join(row.tokens[max(0, start - CONTEXT_TOKENS) : start])
    after = "".join(row.tokens[end : end + CONTEXT_TOKENS])
    return Span(*place, before, "".join(row.tokens[start:end]), after)


def _doubling(numbers_N: Indices) -> Indices:
    """The group of each number from 1: floor(log2), exact for integers."""
    found: Indices = np.minimum(np.frexp(numbers_N)[1] - 1, DOUBLINGS - 1).astype(np.int64)
    return found


def _range(group: int, *, first: int) -> str:
    """The numbers of a group: positions count from 0, lengths from 1."""
    low, high = 2**group - 1 + first, 2 ** (group + 1) - 2 + first
    if group == DOUBLINGS - 1:
        return f"from {low}"
    return str(low) if low == high else f"{low}-{high}"


def _named(values: GroupedValues, names: list[str]) -> list[tuple[str, Distribution]]:
    found = ((name, values.of(group)) for group, name in enumerate(names))
    return [(name, distribution) for name, distribution in found if distribution is not None]
