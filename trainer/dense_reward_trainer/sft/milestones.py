"""Samples processed after each step of a run, and the step that reaches a fraction of them. Pure functions."""

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from math import ceil


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
        target = ceil(Fraction(str(fraction)) * self.samples_total)
        return bisect_left(range(self.total_steps), target, key=self.samples_processed)
