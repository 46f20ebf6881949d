"""Samples processed after each step of a run, and the step that reaches a fraction of them. Pure functions.

A sample is a demonstration, also if rows of several demonstrations are trained on.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Protocol


class Schedule(Protocol):
    """What the milestones and manifests of a run need to know."""

    @property
    def total_steps(self) -> int: ...
    @property
    def samples_total(self) -> int: ...
    def samples_processed(self, step: int) -> int: ...
    def unique_samples(self, step: int) -> int: ...
    def step_at(self, fraction: float) -> int: ...
    def words(self) -> str: ...


@dataclass(frozen=True, slots=True)
class MilestoneSchedule:
    """A run over `samples` demonstrations that processes up to `samples_per_step` of them in each optimiser step.

    `samples_per_step` = batch size x gradient accumulation x processes. The last step of an epoch processes the rest of
    its samples; the next epoch starts with all samples again.
    """

    samples: int
    samples_per_step: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.samples_per_step)

    @property
    def samples_total(self) -> int:
        """Samples that the whole run processes, repeats counted."""
        return self.samples_processed(self.total_steps)

    def samples_processed(self, step: int) -> int:
        """Samples processed after `step` optimiser steps, repeats counted.

        Samples that a distributed sampler repeats, to give all processes equally many batches, do not count.
        """
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples + min(steps * self.samples_per_step, self.samples)

    def unique_samples(self, step: int) -> int:
        """Different demonstrations processed after `step` optimiser steps."""
        return min(self.samples_processed(step), self.samples)

    def step_at(self, fraction: float) -> int:
        """The first step at or past `fraction` of the samples that the whole run processes: 0 only for the fraction 0.

        The fraction is read as the decimal number that the user wrote: 0.1 is exactly one tenth.
        """
        return _step_at(fraction, self)

    def words(self) -> str:
        return f"{self.total_steps} steps of {self.samples_per_step} samples"


@dataclass(frozen=True, slots=True)
class PackedSchedule:
    """A run over packed rows: `samples_by_step[e][s]` is the number of samples of the first s steps of epoch e.

    The order of the rows of each epoch is known before the run, so each step's samples are counted exactly.
    """

    rows_per_step: int
    total_steps: int
    samples_by_step: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, samples: Sequence[int], order: Callable[[int], Sequence[int]], rows_per_step: int, total_steps: int
    ) -> "PackedSchedule":
        """`samples`: of each row. `order`: epoch -> the indices of the rows in the order of training."""
        steps_per_epoch = -(-len(samples) // rows_per_step)
        epochs = []
        for epoch in range(-(-total_steps // steps_per_epoch)):
            counts = [samples[row] for row in order(epoch)]
            of_step = [sum(counts[at : at + rows_per_step]) for at in range(0, len(counts), rows_per_step)]
            epochs.append((0, *accumulate(of_step)))
        return cls(rows_per_step, total_steps, tuple(epochs))

    @property
    def samples_total(self) -> int:
        """Samples that the whole run processes, repeats counted."""
        return self.samples_processed(self.total_steps)

    def samples_processed(self, step: int) -> int:
        """Samples processed after `step` optimiser steps, repeats counted, as in MilestoneSchedule."""
        whole, steps = divmod(step, len(self.samples_by_step[0]) - 1)
        return whole * self._samples + (self.samples_by_step[whole][steps] if steps else 0)

    def unique_samples(self, step: int) -> int:
        """Different demonstrations processed after `step` optimiser steps."""
        return min(self.samples_processed(step), self._samples)

    def step_at(self, fraction: float) -> int:
        """As in MilestoneSchedule."""
        return _step_at(fraction, self)

    def words(self) -> str:
        mean = self.samples_total / self.total_steps
        return f"{self.total_steps} steps of {self.rows_per_step} rows, {mean:.1f} samples on average"

    @property
    def _samples(self) -> int:
        """Demonstrations of an epoch."""
        return self.samples_by_step[0][-1]


def _step_at(fraction: float, schedule: Schedule) -> int:
    target = ceil(Fraction(str(fraction)) * schedule.samples_total)
    return bisect_left(range(schedule.total_steps), target, key=schedule.samples_processed)
