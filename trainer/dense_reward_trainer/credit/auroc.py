"""AUROC and mean with bootstrap intervals: how well scores separate two groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
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
    draws_R = auroc_draws(scores, positive, cluster, seed, resamples)
    low, high = np.percentile(draws_R if len(draws_R) else [value], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def auroc_draws(
    scores: Sequence[float], positive: Sequence[bool], cluster: Sequence[int], seed: int, resamples: int
) -> NDArray[np.float64]:
    """AUROC of each bootstrap resample of the clusters that holds both groups, [R].

    Which clusters are drawn depends on `positive`, `cluster` and `seed` only. So the draws of two scores of the same
    answers are paired, and their differences are those of one resample.
    """
    positive_N = np.asarray(positive, dtype=np.bool_)
    place_N = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)[1]
    cluster_N = np.unique(np.asarray(cluster), return_inverse=True)[1]
    clusters, places = int(cluster_N.max()) + 1, int(place_N.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = []
    # not scipy's bootstrap: it keeps resamples without an AUROC, and its interval is then nan
    for _ in range(resamples):
        times_N = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[cluster_N]
        positive_V, negative_V = (
            np.bincount(place_N, times_N * chosen_N, places).astype(np.float64)
            for chosen_N in (positive_N, ~positive_N)
        )
        if positive_V.any() and negative_V.any():
            drawn.append(_auroc_of_counts(positive_V, negative_V))
    return np.array(drawn, dtype=np.float64)


def _auroc_of_counts(positive_V: NDArray[np.float64], negative_V: NDArray[np.float64]) -> float:
    """AUROC from the number of positives and negatives at each of the V different scores, from the least up."""
    won_V = np.cumsum(negative_V) - negative_V / 2
    return float(positive_V @ won_V / (positive_V.sum() * negative_V.sum()))
