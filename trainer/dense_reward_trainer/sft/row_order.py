"""The order of the rows of an epoch: it depends only on the seed and the epoch, so a resumed run has the same.

transformers' own length-grouped sampler draws from the global random generator, so a run that was killed within an
epoch would resume in a different order. The order of packed rows must be known before the run: it says how many
demonstrations each step processes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from dense_reward_trainer.sft.callbacks import EndsAtLastStep

Order = Callable[[int], list[int]]
"""Epoch -> the indices of all rows, each once."""


def order_by_length(lengths: Sequence[int], rows_per_step: int, seed: int) -> Order:
    """The rows of a step have similar lengths (in tokens), and the longest row comes first."""

    def order(epoch: int) -> list[int]:
        return [int(i) for i in get_length_grouped_indices(list(lengths), rows_per_step, generator=_of(seed, epoch))]

    return order


def shuffled_order(rows: int, seed: int) -> Order:
    return lambda epoch: [int(i) for i in torch.randperm(rows, generator=_of(seed, epoch))]


def _of(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class OrderedSampler(Sampler[int]):
    """Indices of all rows. `epoch()`: the current one; called at its start and when a run resumes within it."""

    def __init__(self, order: Order, rows: int, epoch: Callable[[], int]) -> None:
        self._order, self._rows, self._epoch = order, rows, epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._order(self._epoch()))


class OrderedTrainer(EndsAtLastStep, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; `order`, set before training, is that of its rows; None: the trainer's own random order."""

    order: Order | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.order is None:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        rows = len(self.train_dataset)
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps_per_epoch = -(-rows // per_step)
        return OrderedSampler(self.order, rows, lambda: self.state.global_step // steps_per_epoch)
