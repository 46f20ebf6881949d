"""Distributions of numbers that arrive in any amount, in constant memory, with quantiles to a known error.

Each value is counted in a bin whose ends have the ratio 1.01 (values below 1e-4 in absolute value share one bin), so a
quantile is within 0.5 % of an exact one. Values beyond 1e7 count as 1e7; sums of responses stay far below. This is the
sketch of Masson, Rim and Lee, "DDSketch" (VLDB 2019), with fixed bins.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATIO, SMALLEST, LARGEST = 1.01, 1e-4, 1e7
BINS_PER_SIGN = math.ceil(math.log(LARGEST / SMALLEST) / math.log(RATIO))
BINS = 2 * BINS_PER_SIGN + 1
Floats = NDArray[np.float32] | NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a group of values looks like. `negative`: the share below 0."""

    count: int
    mean: float
    std: float
    negative: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    min: float
    max: float


class GroupedValues:
    """The distribution of values in each of several groups."""

    def __init__(self, groups: int) -> None:
        self._counts = np.zeros((groups, BINS), dtype=np.int64)
        self._sums = np.zeros(groups)
        self._squares = np.zeros(groups)
        self._negative = np.zeros(groups, dtype=np.int64)
        self._min = np.full(groups, np.inf)
        self._max = np.full(groups, -np.inf)

    def add(self, values_N: Floats, groups_N: Indices) -> None:
        """Count N values, each in its group."""
        values = values_N.astype(np.float64)
        groups = len(self._sums)
        self._counts += np.bincount(groups_N * BINS + bins(values), minlength=groups * BINS).reshape(groups, BINS)
        self._sums += np.bincount(groups_N, values, groups)
        self._squares += np.bincount(groups_N, values**2, groups)
        self._negative += np.bincount(groups_N, values < 0, groups).astype(np.int64)
        np.minimum.at(self._min, groups_N, values)
        np.maximum.at(self._max, groups_N, values)

    def of(self, group: int) -> Distribution | None:
        """None if the group has no value."""
        counts = self._counts[group]
        count = int(counts.sum())
        if count == 0:
            return None
        mean = self._sums[group] / count
        p5, p25, p50, p75, p95 = (self._quantile(group, share) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
        return Distribution(
            count,
            float(mean),
            math.sqrt(max(0.0, self._squares[group] / count - mean**2)),
            int(self._negative[group]) / count,
            p5,
            p25,
            p50,
            p75,
            p95,
            float(self._min[group]),
            float(self._max[group]),
        )

    def _quantile(self, group: int, share: float) -> float:
        """The smallest value that at least this share of the values do not exceed, to the width of its bin."""
        reached = np.cumsum(self._counts[group])
        index = int(np.searchsorted(reached, share * reached[-1]))
        return float(np.clip(_middle(index), self._min[group], self._max[group]))


def bins(values_N: NDArray[np.float64]) -> Indices:
    """The bin of each value: negative ones first, the largest last."""
    size = np.clip(np.abs(values_N), SMALLEST, LARGEST)
    steps = np.ceil(np.log(size / SMALLEST) / math.log(RATIO)).clip(0, BINS_PER_SIGN).astype(np.int64)
    found: Indices = BINS_PER_SIGN + np.where(values_N < 0, -steps, steps)
    return found


def _middle(index: int) -> float:
    steps = index - BINS_PER_SIGN
    if steps == 0:
        return 0.0
    end = SMALLEST * RATIO ** abs(steps)
    return math.copysign(2 * end / (1 + RATIO), steps)
