"""How many samples a run has processed after a step, and at which step a fraction of them is reached. Pure."""

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from math import ceil


@dataclass(frozen=True, slots=True)
class MilestoneSchedule:
    """A run over `samples` demonstrations that takes up to `samples_per_step` of them in each optimiser step.

    `samples_per_step` = batch x gradient accumulation x processes. The last step of an epoch takes what is left of it;
    an epoch starts with all samples anew.
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
        """Samples processed once `step` optimiser steps are done, repeats counted.

        What a sampler repeats to give each process as many batches as the others does not count.
        """
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples + min(steps * self.samples_per_step, self.samples)

    def unique_samples(self, step: int) -> int:
        """Different demonstrations seen once `step` optimiser steps are done."""
        return min(self.samples_processed(step), self.samples)

    def step_at(self, fraction: float) -> int:
        """The first step at or past `fraction` of the samples that the whole run processes; at least 1.

        The fraction is taken as the decimal number that it was written as: 0.1 is one tenth.
        """
        target = ceil(Fraction(str(fraction)) * self.samples_total)
        return 1 + bisect_left(range(1, self.total_steps), target, key=self.samples_processed)
