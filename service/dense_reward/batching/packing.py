"""Trunks and branches -> rows of tokens without padding. A row is computed in one forward. Pure; no device, no model.

A row holds trees one after another. A tree is a prompt, computed once, followed by the branches that continue it; a
branch attends to its prompt and to itself, never to another branch. Equal prompts become one tree, even if they are
from different requests. The invariants:

- Every scored token is predicted exactly once, by the token before it: the prompt's last one for a branch's first.
- Nothing that no scored token attends to is computed: a branch ends before its last scored token (except at a RoPE
  length limit, see `computed_tokens`), because that token is only predicted.
- Branches of a tree are ordered by length. A group of branches of equal length is one rectangle, which kernels can
  compute without padding.
- A row never mixes sequences on two sides of a RoPE length limit: the model would rotate all of them alike.
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
    """`count` branches of one tree, each `length` tokens long, one after another from index `start` of the row."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Tree:
    """`tokens` of a prompt from index `start` of the row, and the branches behind them, shortest first.

    A prompt with a single branch has no stretches: prompt and branch together are one causal sequence of `tokens`.
    """

    start: int
    tokens: int
    branches: tuple[Stretch, ...]

    @property
    def longest_tokens(self) -> int:
        """Length of the longest sequence: the prompt and its longest branch."""
        return self.tokens + max((stretch.length for stretch in self.branches), default=0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A branch with at least one scored token.

    `trunk`, `branch`: its place in the batch. `computed_tokens`: how many of its tokens are computed, prompt excluded.
    `limits_passed`: how many of the RoPE length limits the whole sequence exceeds.
    """

    trunk: int
    branch: int
    prompt_P: IdArray
    source: Branch
    computed_tokens: int
    limits_passed: int

    @property
    def scored_S(self) -> Index:  # noqa: N802 - names carry shapes
        """Indices of the scored tokens in the branch."""
        return np.flatnonzero(self.source.scored_T)


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of N tokens. The S scored ones are predicted at R <= S indices: branches share the prompt's last.

    `positions_N`: RoPE positions, counted from 0 in each sequence. `rows_R`: the indices whose logits are needed.
    `row_S`: for each scored token, leaf by leaf, the entry of `rows_R` that predicts it.
    """

    ids_N: IdArray
    positions_N: IdArray
    trees: tuple[Tree, ...]
    rows_R: Index
    row_S: Index
    leaves: tuple[Leaf, ...]


def computed_tokens(prompt_tokens: int, branch: Branch, rope_length_limits: Collection[int] = ()) -> int:
    """Number of tokens of a branch that must be computed: those before its last scored one. Later ones change no score.

    longrope models rotate a whole sequence differently once it exceeds a length limit, so a sequence over a limit is
    computed in full if the cut sequence would be below that limit.
    """
    if not branch.scored_T.any():
        return 0
    whole = len(branch.ids_T)
    cut = whole - 1 - int(branch.scored_T[::-1].argmax())
    return whole if any(prompt_tokens + cut <= limit < prompt_tokens + whole for limit in rope_length_limits) else cut


def pack(
    trunks: Sequence[Trunk], *, max_tokens: int, rope_length_limits: Collection[int] = (), alone: bool = False
) -> list[Packed]:
    """Rows of at most `max_tokens`, or of one sequence that is longer. Every scored token is in exactly one row.

    Sequences on different sides of one of the `rope_length_limits` never share a row. `alone`: one sequence per row.
    """
    rows = _rows(leaves(trunks, rope_length_limits), max_tokens)
    if alone:
        rows = ([sequence] for row in list(rows) for sequence in row)
    return [_packed(row) for row in rows]


def leaves(trunks: Sequence[Trunk], rope_length_limits: Collection[int] = ()) -> list[Leaf]:
    """All branches with a scored token. Those that share a prompt are neighbours, the shortest first."""
    unsorted = [
        Leaf(
            t,
            b,
            trunk.prompt_P,
            branch,
            computed_tokens(len(trunk.prompt_P), branch, rope_length_limits),
            sum(len(trunk.prompt_P) + len(branch.ids_T) > limit for limit in rope_length_limits),
        )
        for t, trunk in enumerate(trunks)
        for b, branch in enumerate(trunk.branches)
        if branch.scored_T.any()
    ]
    # Reversed, so that the first of equal prompts determines the place of their tree: trees keep the order of the
    # batch.
    place = {key: i for i, key in reversed([*enumerate(map(_tree_key, unsorted))])}
    return sorted(unsorted, key=lambda leaf: (leaf.limits_passed, place[_tree_key(leaf)], leaf.computed_tokens))


def _tree_key(leaf: Leaf) -> tuple[int, bytes]:
    return leaf.limits_passed, leaf.prompt_P.tobytes()


def _rows(sequences: Sequence[Leaf], max_tokens: int) -> Iterator[list[Leaf]]:
    row: list[Leaf] = []
    tokens = 0
    for sequence in sequences:
        same_tree = bool(row) and _tree_key(row[-1]) == _tree_key(sequence)
        added = sequence.computed_tokens + (0 if same_tree else len(sequence.prompt_P))
        if row and (row[-1].limits_passed != sequence.limits_passed or tokens + added > max_tokens):
            yield row
            # If a row ends inside a tree, the next row repeats the tree's prompt.
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
            # Logits at an index predict the next token; before a branch's first token that is the prompt's last.
            predicting.append(np.where(scored_S == 0, start + prompt_tokens - 1, at + scored_S - 1))
            at += member.computed_tokens
        trees.append(_tree(start, prompt_tokens, [member.computed_tokens for member in members]))
    rows_R, row_S = np.unique(np.concatenate(predicting), return_inverse=True)
    return Packed(np.concatenate(ids), np.concatenate(positions), tuple(trees), rows_R, row_S, tuple(sequences))


def _tree(start: int, prompt_tokens: int, lengths: Sequence[int]) -> Tree:
    """`lengths`: computed tokens of each branch, ascending. One of length 0 is predicted by the prompt alone."""
    longer = [length for length in lengths if length]
    if len(longer) == 1:
        return Tree(start, prompt_tokens + longer[0], ())
    stretches, at = [], start + prompt_tokens
    for length, equal in groupby(longer):
        count = len(list(equal))
        stretches.append(Stretch(at, count, length))
        at += count * length
    return Tree(start, prompt_tokens, tuple(stretches))
