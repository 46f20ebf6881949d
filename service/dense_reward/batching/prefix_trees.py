"""Sequences -> the trees of a row, in which whatever sequences begin with in common is computed once. Pure; no device.

Such a beginning can be a prompt with several responses, a system prompt before many prompts, or the earlier turns of a
conversation. A sequence that is the beginning of another one takes no tokens of its own.

Shapes: L tokens of a sequence, N tokens of a row.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from dense_reward.records import IdArray

Index = NDArray[np.int64]
Range = tuple[int, int]
"""Indices of a row: the first one, and the one behind the last."""
_Path = tuple[tuple[int, int], ...]
"""The parts of a row that hold a sequence: how many of its tokens lie before each part, and the part's first index."""
SHARED_LEAST = 16
"""Fewer common tokens, not counting a prompt, are computed for each sequence: a further tree costs more."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` branches of one tree, each `length` tokens long, one after another from index `start` of the row."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Tree:
    """`tokens` from index `start` of the row, called its trunk, and the branches behind them, shortest first.

    The trunk attends to `context`, the ranges of the row that precede it in its sequences, and causally to itself; each
    branch attends to the context, the trunk and itself. A trunk with a single branch and no other continuation has no
    stretches: both together are one causal sequence of `tokens`.
    """

    start: int
    tokens: int
    branches: tuple[Stretch, ...]
    context: tuple[Range, ...] = ()

    @property
    def trunk(self) -> Range:
        return self.start, self.start + self.tokens

    @property
    def longest_tokens(self) -> int:
        """Length of the longest sequence that ends in this tree: the context, the trunk and the longest branch."""
        before = sum(stop - start for start, stop in self.context)
        return before + self.tokens + max((stretch.length for stretch in self.branches), default=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of N tokens, its trees, and for each sequence the parts of the row that hold it."""

    ids_N: IdArray
    positions_N: IdArray
    trees: tuple[Tree, ...]
    paths: tuple[_Path, ...]

    def indices(self, sequence: int, positions: Index) -> Index:
        """Where tokens of a sequence are in the row, given their positions in the sequence."""
        depths, starts = np.array(self.paths[sequence]).T
        part = np.searchsorted(depths, positions, side="right") - 1
        found: Index = positions - depths[part] + starts[part]
        return found


def common_tokens(one: IdArray, other: IdArray) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(one), len(other))
    different = one[:shorter] != other[:shorter]
    return int(different.argmax()) if different.any() else shorter


def sort_key(ids_L: IdArray) -> bytes:
    """Sorted by it, sequences with a common beginning are neighbours, and a beginning precedes what continues it."""
    return ids_L.astype(">i4").tobytes()


def lay_out(sequences: Sequence[IdArray], shared: Sequence[int]) -> Layout:
    """Lay out sequences that are sorted by `sort_key`.

    `shared`: how many tokens each one shares with its predecessor, at most `common_tokens`. It takes the others itself.
    """
    kept: list[int] = []
    shared_of_kept: list[int] = []
    since_kept = 0
    for i, ids_L in enumerate(sequences):
        since_kept = min(since_kept, shared[i])
        continued = i + 1 < len(sequences) and shared[i + 1] == len(ids_L)
        if not continued:
            kept.append(i)
            shared_of_kept.append(since_kept)
            since_kept = len(ids_L)
    layout = _Layouter([sequences[i] for i in kept], np.array(shared_of_kept, dtype=np.int64)).layout()
    # A sequence that is the beginning of others lies along the path of the next one that is kept.
    return replace(layout, paths=tuple(layout.paths[bisect_left(kept, i)] for i in range(len(sequences))))


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences from `first` up to `last` whose first `depth` tokens are laid out already, along `path`."""

    first: int
    last: int
    depth: int
    path: _Path

    @property
    def alone(self) -> bool:
        return self.last == self.first + 1


class _Layouter:
    """Lays out sequences of which none is the beginning of another."""

    def __init__(self, sequences: Sequence[IdArray], shared_S: Index) -> None:
        self._sequences = sequences
        self._shared_S = shared_S
        self._ids: list[IdArray] = []
        self._positions: list[IdArray] = []
        self._trees: list[Tree] = []
        self._paths: list[_Path] = [()] * len(sequences)
        self._at = 0

    def layout(self) -> Layout:
        # A list instead of recursion: a sequence can continue the one before it thousands of times.
        waiting = self._parts(_Group(0, len(self._sequences), 0, ()))[::-1]
        while waiting:
            waiting += self._tree(waiting.pop())[::-1]
        ids_N, positions_N = np.concatenate(self._ids), np.concatenate(self._positions)
        return Layout(ids_N, positions_N, tuple(self._trees), tuple(self._paths))

    def _tree(self, group: _Group) -> list[_Group]:
        """Lay out what a group shares, and its sequences that share nothing more. Returns the groups that do."""
        if group.alone:
            self._trees.append(Tree(self._at, self._own_tokens(group), (), _ranges(group.path, group.depth)))
            self._lay(group, len(self._sequences[group.first]))
            return []
        start, end = self._at, int(self._shared_S[group.first + 1 : group.last].min())
        path = self._lay(group, end)
        parts = self._parts(replace(group, depth=end, path=path))
        branches = self._branches([part for part in parts if part.alone])
        self._trees.append(Tree(start, end - group.depth, branches, _ranges(group.path, group.depth)))
        return [part for part in parts if not part.alone]

    def _parts(self, group: _Group) -> list[_Group]:
        """Cut a group between sequences that share only what is laid out."""
        cuts = group.first + 1 + np.flatnonzero(self._shared_S[group.first + 1 : group.last] == group.depth)
        ends = pairwise([group.first, *cuts.tolist(), group.last])
        return [replace(group, first=first, last=last) for first, last in ends]

    def _branches(self, alone: Sequence[_Group]) -> tuple[Stretch, ...]:
        stretches = []
        for length, equal in groupby(sorted(alone, key=self._own_tokens), self._own_tokens):
            start = self._at
            for part in equal:
                self._lay(part, part.depth + length)
            stretches.append(Stretch(start, (self._at - start) // length, length))
        return tuple(stretches)

    def _own_tokens(self, alone: _Group) -> int:
        return len(self._sequences[alone.first]) - alone.depth

    def _lay(self, group: _Group, end: int) -> _Path:
        """Append what a group shares up to `end`. Returns its path so far."""
        path = self._paths[group.first] = (*group.path, (group.depth, self._at))
        self._ids.append(self._sequences[group.first][group.depth : end])
        self._positions.append(np.arange(group.depth, end, dtype=np.int32))
        self._at += end - group.depth
        return path


def _ranges(path: _Path, depth: int) -> tuple[Range, ...]:
    """The indices of a sequence's first `depth` tokens, which lie along a path."""
    ranges: list[Range] = []
    for (before, start), (behind, _) in pairwise([*path, (depth, 0)]):
        adjacent = bool(ranges) and ranges[-1][1] == start
        first = ranges.pop()[0] if adjacent else start
        ranges.append((first, start + behind - before))
    return tuple(ranges)
