"""AUROC and mean with bootstrap intervals: how well scores separate two groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, rankdata


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def auroc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs, the area under the ROC curve (Mann and Whitney, 1947).

    Raises ValueError if either group is empty.
    """
    high, low = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    if not len(high) or not len(low):
        raise ValueError(f"AUROC compares two groups, but they hold {len(high)} and {len(low)} scores")
    # not mannwhitneyu: its p-value, which we do not need, warns if all scores are equal
    rank_sum = rankdata(np.concatenate([high, low]))[: len(high)].sum()
    return float((rank_sum - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def mean_interval(values: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """The mean with a percentile bootstrap interval over the values (Efron, 1979); one value gives a point."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(seed)
    found = bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=rng).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def auroc_interval(
    scores: Sequence[float], positive: Sequence[bool], cluster: Sequence[int], seed: int, resamples: int = 500
) -> Interval:
    """AUROC with a percentile bootstrap interval over clusters: scores of one cluster are not independent.

    A resample that holds only one group has no AUROC and is left out. Raises ValueError if either group is empty.
    """
    score_N, positive_N = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.bool_)
    value = auroc(score_N[positive_N], score_N[~positive_N])
    cluster_N = np.unique(np.asarray(cluster), return_inverse=True)[1]
    clusters = int(cluster_N.max()) + 1
    rng = np.random.default_rng(seed)
    resampled = []
    # not scipy's bootstrap: it keeps resamples without an AUROC, and its interval is then nan
    for _ in range(resamples):
        times_N = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[cluster_N]
        groups = [np.repeat(score_N[chosen_N], times_N[chosen_N]) for chosen_N in (positive_N, ~positive_N)]
        if all(len(group) for group in groups):
            resampled.append(auroc(*groups))
    low, high = np.percentile(resampled or [value], [2.5, 97.5])
    return Interval(value, float(low), float(high))
