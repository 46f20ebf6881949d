"""Trunks and branches -> rows of tokens without padding. A row is computed in one forward. Pure; no device, no model.

A row holds trees one after another: see prefix_trees.py. What several sequences of a row begin with is computed once,
even if they are from different requests. The invariants:

- Every scored token is predicted exactly once, by the token before it: the prompt's last one for a branch's first.
- Nothing that no scored token attends to is computed: a branch ends before its last scored token (except at a RoPE
  length limit, see `computed_tokens`), because that token is only predicted.
- Branches of a tree are ordered by length. A group of branches of equal length is one rectangle, which kernels can
  compute without padding.
- A row never mixes sequences on two sides of a RoPE length limit: the model would rotate all of them alike.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dense_reward.batching.prefix_trees import SHARED_LEAST, Index, Tree, common_tokens, lay_out, sort_key
from dense_reward.records import Branch, IdArray, Trunk


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
    def sequence_L(self) -> IdArray:  # noqa: N802 - names carry shapes
        """The prompt and the computed tokens of the branch."""
        return np.concatenate([self.prompt_P, self.source.ids_T[: self.computed_tokens]])

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
    sequences = [_Sequence(leaf, leaf.sequence_L) for leaf in leaves(trunks, rope_length_limits)]
    sequences.sort(key=lambda sequence: (sequence.leaf.limits_passed, sort_key(sequence.ids_L)))
    rows = [[sequence] for sequence in sequences] if alone else _rows(sequences, max_tokens)
    return [_packed(row) for row in rows]


def leaves(trunks: Sequence[Trunk], rope_length_limits: Collection[int] = ()) -> list[Leaf]:
    """All branches with a scored token, in their order."""
    return [
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


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A leaf, and all of its L tokens that are computed."""

    leaf: Leaf
    ids_L: IdArray

    def shares_with(self, before: "_Sequence") -> int:
        """How many tokens it shares with its predecessor: all that they begin with, or at least a prompt."""
        common = common_tokens(before.ids_L, self.ids_L)
        prompts = (len(before.leaf.prompt_P), len(self.leaf.prompt_P))
        prompt_tokens = max((tokens for tokens in prompts if tokens <= common), default=0)
        return common if common - prompt_tokens >= SHARED_LEAST else prompt_tokens


def _rows(sequences: Sequence[_Sequence], max_tokens: int) -> Iterator[list[_Sequence]]:
    row: list[_Sequence] = []
    tokens = 0
    for sequence in sequences:
        added = len(sequence.ids_L) - (sequence.shares_with(row[-1]) if row else 0)
        if row and (row[-1].leaf.limits_passed != sequence.leaf.limits_passed or tokens + added > max_tokens):
            yield row
            # If a row ends inside a tree, the next row repeats what its sequences share.
            row, tokens, added = [], 0, len(sequence.ids_L)
        row.append(sequence)
        tokens += added
    if row:
        yield row


def _packed(sequences: Sequence[_Sequence]) -> Packed:
    shared = [0, *(after.shares_with(before) for before, after in pairwise(sequences))]
    layout = lay_out([sequence.ids_L for sequence in sequences], shared)
    packed = tuple(sequence.leaf for sequence in sequences)
    # Logits at a token predict the next one; before a branch's first token that is the prompt's last.
    predicting = [layout.indices(i, leaf.scored_S + len(leaf.prompt_P) - 1) for i, leaf in enumerate(packed)]
    rows_R, row_S = np.unique(np.concatenate(predicting), return_inverse=True)
    return Packed(layout.ids_N, layout.positions_N, layout.trees, rows_R, row_S, packed)
