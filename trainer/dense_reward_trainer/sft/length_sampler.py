"""Batches of similar lengths, in an order that depends only on the seed and the epoch, so a resumed run has the same.

transformers' own length-grouped sampler draws from the global random generator, so a run that was killed within an
epoch would resume in a different order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer


class LengthGroupedSampler(Sampler[int]):
    """Indices of all samples; the samples of a batch have similar lengths, and the longest sample comes first.

    `epoch()` returns the current epoch. It is called at the start of an epoch and when a run resumes within one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class LengthGroupedTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the length-grouped sampler."""

    def _get_train_sampler(self, train_dataset: object = None) -> LengthGroupedSampler:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps_per_epoch = -(-len(lengths) // per_step)
        return LengthGroupedSampler(
            lengths, per_step, self.args.seed, lambda: self.state.global_step // steps_per_epoch
        )
