"""Count, mean and standard deviation of numbers that arrive in parts; older parts can weigh less. Pure numpy."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from dense_reward.records import FloatArray


@dataclass(frozen=True, slots=True)
class RunningStats:
    """Sums over numbers: how many, their total, their squares, and how many are below 0."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    negative: float = 0.0

    @classmethod
    def of(cls, arrays: Iterable[FloatArray]) -> Self:
        values = np.concatenate([np.zeros(0, dtype=np.float64), *arrays])
        return cls(len(values), float(values.sum()), float((values**2).sum()), int((values < 0).sum()))

    def __add__(self, other: "RunningStats") -> "RunningStats":
        return RunningStats(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.negative + other.negative,
        )

    def faded(self, factor: float) -> "RunningStats":
        """The same mean and standard deviation, with less weight relative to numbers that are added later."""
        return RunningStats(self.count * factor, self.total * factor, self.squares * factor, self.negative * factor)

    @property
    def mean(self) -> float:
        """NaN if there are no numbers; so are `std` and `negative_ratio`."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) if self.count else math.nan

    @property
    def negative_ratio(self) -> float:
        return self.negative / self.count if self.count else math.nan
