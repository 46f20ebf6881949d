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


def auroc_interval(
    scores: Sequence[float], positive: Sequence[bool], cluster: Sequence[int], seed: int, resamples: int = 500
) -> Interval:
    """AUROC with a percentile bootstrap interval over clusters: scores of one cluster are not independent.

    A resample that holds one group alone says nothing and is left out. Raises ValueError where either group is empty.
    """
    score_N, positive_N = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.bool_)
    value = auroc(score_N[positive_N], score_N[~positive_N])
    places_N = np.unique(np.asarray(cluster), return_inverse=True)[1]
    clusters = int(places_N.max()) + 1
    rng = np.random.default_rng(seed)
    draws = [value]
    for _ in range(resamples):
        times_N = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[places_N]
        groups = [np.repeat(score_N[chosen], times_N[chosen]) for chosen in (positive_N, ~positive_N)]
        if all(len(group) for group in groups):
            draws.append(auroc(*groups))
    return _interval(value, np.array(draws[1:] or draws))


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
