"""Trunks and branches -> rows of tokens without padding, each computed at once. Pure; knows no device and no model.

A row holds trees, one after another: a prompt, computed once, and behind it the branches that continue it. Prompts
that are equal become one tree, whoever sent them. What no scored token looks at is left out: of a branch, everything
from its last scored token on, which is only predicted.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dense_reward.records import Branch, IdArray, Trunk

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` branches of one tree, of the same `length`, one behind another from `start` on."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Tree:
    """`tokens` of a trunk from `start` on, and the branches that see all of it, by length. Positions count from 0."""

    start: int
    tokens: int
    branches: tuple[Stretch, ...]

    @property
    def longest_tokens(self) -> int:
        """Trunk and longest branch together."""
        return self.tokens + max((stretch.length for stretch in self.branches), default=0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A branch that has something to score: whose it is, its prompt, and how many of its tokens are computed."""

    trunk: int
    branch: int
    prompt_P: IdArray
    source: Branch
    computed_tokens: int
    side: int

    @property
    def scored_S(self) -> Index:  # noqa: N802 - names carry shapes
        """Which of its tokens are scored."""
        return np.flatnonzero(self.source.scored_T)


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of N tokens. S scored tokens, one sequence's after another's, are predicted by R different rows."""

    ids_N: IdArray
    positions_N: IdArray
    trees: tuple[Tree, ...]
    rows_R: Index
    row_S: Index
    """For each scored token the entry of `rows_R` that predicts it."""
    leaves: tuple[Leaf, ...]


def computed_tokens(prompt_tokens: int, branch: Branch, rope_length_limits: Collection[int] = ()) -> int:
    """Tokens of a branch that are computed: those before its last scored one, as nothing later changes a score.

    Beyond a border a model turns the whole sequence otherwise, by its length: one that reaches it is computed whole.
    """
    if not branch.scored_T.any():
        return 0
    whole = len(branch.ids_T)
    cut = whole - 1 - int(branch.scored_T[::-1].argmax())
    return whole if any(prompt_tokens + cut <= border < prompt_tokens + whole for border in rope_length_limits) else cut


def pack(
    trunks: Sequence[Trunk], *, max_tokens: int, rope_length_limits: Collection[int] = (), alone: bool = False
) -> list[Packed]:
    """Rows of at most `max_tokens`, or of one sequence that is longer; every scored token is in exactly one of them.

    Sequences on different sides of one of the `rope_length_limits` never share a row. `alone`: no two sequences do.
    """
    rows = _rows(leaves(trunks, rope_length_limits), max_tokens)
    if alone:
        rows = ([sequence] for row in list(rows) for sequence in row)
    return [_packed(row) for row in rows]


def leaves(trunks: Sequence[Trunk], rope_length_limits: Collection[int] = ()) -> list[Leaf]:
    """All branches with a scored token; those that share a prompt stand together, the short ones first."""
    found = [
        Leaf(
            t,
            b,
            trunk.prompt_P,
            branch,
            computed_tokens(len(trunk.prompt_P), branch, rope_length_limits),
            sum(len(trunk.prompt_P) + len(branch.ids_T) > border for border in rope_length_limits),
        )
        for t, trunk in enumerate(trunks)
        for b, branch in enumerate(trunk.branches)
        if branch.scored_T.any()
    ]
    place = {key: i for i, key in reversed([*enumerate(map(_tree_key, found))])}
    return sorted(found, key=lambda s: (s.side, place[_tree_key(s)], s.computed_tokens))


def _tree_key(sequence: Leaf) -> tuple[int, bytes]:
    return sequence.side, sequence.prompt_P.tobytes()


def _rows(sequences: Sequence[Leaf], max_tokens: int) -> Iterator[list[Leaf]]:
    row: list[Leaf] = []
    tokens = 0
    for sequence in sequences:
        same_tree = bool(row) and _tree_key(row[-1]) == _tree_key(sequence)
        added = sequence.computed_tokens + (0 if same_tree else len(sequence.prompt_P))
        if row and (row[-1].side != sequence.side or tokens + added > max_tokens):
            yield row
            row, tokens, added = [], 0, sequence.computed_tokens + len(sequence.prompt_P)
        row.append(sequence)
        tokens += added
    if row:
        yield row


def _packed(sequences: Sequence[Leaf]) -> Packed:
    ids: list[IdArray] = []
    positions: list[IdArray] = []
    trees: list[Tree] = []
    predicting: list[Index] = []
    at = 0
    for _, group in groupby(sequences, _tree_key):
        members = list(group)
        prompt_tokens = len(members[0].prompt_P)
        start = at
        ids.append(members[0].prompt_P)
        positions.append(np.arange(prompt_tokens, dtype=np.int32))
        at += prompt_tokens
        for member in members:
            ids.append(member.source.ids_T[: member.computed_tokens])
            positions.append(np.arange(prompt_tokens, prompt_tokens + member.computed_tokens, dtype=np.int32))
            scored_S = member.scored_S
            predicting.append(np.where(scored_S == 0, start + prompt_tokens - 1, at + scored_S - 1))
            at += member.computed_tokens
        trees.append(_tree(start, prompt_tokens, [member.computed_tokens for member in members]))
    rows_R, row_S = np.unique(np.concatenate(predicting), return_inverse=True)
    return Packed(np.concatenate(ids), np.concatenate(positions), tuple(trees), rows_R, row_S, tuple(sequences))


def _tree(start: int, prompt_tokens: int, lengths: Sequence[int]) -> Tree:
    """`lengths` rise. A single branch is the trunk's own continuation: one causal sequence."""
    longer = [length for length in lengths if length]
    if len(longer) == 1:
        return Tree(start, prompt_tokens + longer[0], ())
    stretches, at = [], start + prompt_tokens
    for length, equal in groupby(longer):
        count = len(list(equal))
        stretches.append(Stretch(at, count, length))
        at += count * length
    return Tree(start, prompt_tokens, tuple(stretches))
