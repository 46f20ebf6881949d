"""Batches of similar lengths, in an order that depends on the seed and the epoch alone, so that a resumed run keeps it.

transformers' own sampler draws from the global generator: a run that was killed within an epoch would go on in another
order. Must not know jobs.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer


class LengthOrder(Sampler[int]):
    """Indices of all samples, the longest first; neighbours within `batch_size` have similar lengths.

    `epoch` is asked when an epoch begins, or is taken up again in its middle.
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


class LengthOrderedTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with that order."""

    def _get_train_sampler(self, train_dataset: object = None) -> LengthOrder:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps_per_epoch = -(-len(lengths) // per_step)
        return LengthOrder(lengths, per_step, self.args.seed, lambda: self.state.global_step // steps_per_epoch)
