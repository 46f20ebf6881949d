"""Sequences -> batches padded on the right, for models that cannot be computed packed. Prompts are not shared."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dense_reward.batching.packing import Leaf
from dense_reward.batching.prefix_trees import Index
from dense_reward.records import IdArray


@dataclass(frozen=True, slots=True)
class Padded:
    """One batch: sequences of similar lengths, and the positions in each that predict a scored token."""

    leaves: tuple[Leaf, ...]

    @property
    def ids(self) -> list[IdArray]:
        return [np.concatenate([leaf.prompt_P, leaf.source.ids_T])[: _length(leaf)] for leaf in self.leaves]

    @property
    def positions(self) -> list[IdArray]:
        return [(leaf.scored_S + len(leaf.prompt_P) - 1).astype(np.int32) for leaf in self.leaves]

    @property
    def row_S(self) -> Index:  # noqa: N802 - names carry shapes
        """For each scored token, its row of logits. In a padded batch, no two tokens share a row."""
        return np.arange(sum(len(leaf.scored_S) for leaf in self.leaves))


def padded_batches(
    leaves: Sequence[Leaf], *, max_tokens: int, rope_length_limits: Collection[int] = ()
) -> Iterator[Padded]:
    """Batches of at most `max_tokens` after padding, or of one sequence that is longer.

    No batch holds lengths on both sides of one of the `rope_length_limits`.
    """
    batch: list[Leaf] = []
    for leaf in sorted(leaves, key=_length):
        length = _length(leaf)
        crosses = batch and any(_length(batch[0]) <= limit < length for limit in rope_length_limits)
        if batch and (crosses or (len(batch) + 1) * length > max_tokens):
            yield Padded(tuple(batch))
            batch = []
        batch.append(leaf)
    if batch:
        yield Padded(tuple(batch))


def _length(leaf: Leaf) -> int:
    return len(leaf.prompt_P) + leaf.computed_tokens
