"""How well scores tell two groups apart. Pure numpy; knows no models and no text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def auroc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs, the area under the ROC curve (Mann and Whitney, 1947).

    Raises ValueError where either group is empty.
    """
    high, low = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))
    if not len(high) or not len(low):
        raise ValueError(f"AUROC compares two groups, but they hold {len(high)} and {len(low)} scores")
    below = np.searchsorted(low, high, side="left")
    ties = np.searchsorted(low, high, side="right") - below
    return float((below + ties / 2).sum() / (len(high) * len(low)))


def mean_interval(values: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """The mean with a percentile bootstrap interval over the values (Efron, 1979)."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (resamples, len(array)))].mean(axis=1)
    return _interval(float(array.mean()), means)


def auroc_interval(positives: Sequence[float], negatives: Sequence[float], seed: int, resamples: int = 500) -> Interval:
    """AUROC with a percentile bootstrap interval, each group resampled."""
    high, low = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = [auroc(rng.choice(high, len(high)), rng.choice(low, len(low))) for _ in range(resamples)]
    return _interval(auroc(high, low), np.array(draws))


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
