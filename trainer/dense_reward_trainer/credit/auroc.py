"""AUROC and mean with bootstrap intervals: how well scores separate two groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata

COUNTS_TOGETHER = 1 << 21
"""Counts of a bootstrap, resamples times scores, that are in memory at a time."""


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
    value_N, place_N = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    starts_V = np.searchsorted(place_N[order_N], np.arange(len(value_N)))
    positive_N = np.asarray(positive, dtype=np.bool_)[order_N]
    # not scipy's bootstrap: it keeps resamples without an AUROC, and its interval is then nan
    parts = [_aurocs(times_rN[:, order_N], positive_N, starts_V) for times_rN in _times_drawn(cluster, seed, resamples)]
    return np.concatenate(parts)


def _aurocs(
    times_RN: NDArray[np.int64], positive_N: NDArray[np.bool_], starts_V: NDArray[np.intp]
) -> NDArray[np.float64]:
    """AUROC of each resample that holds both groups. Scores are in order; `starts_V`: the first of each value."""
    positive_RV, negative_RV = (
        np.add.reduceat(times_RN * chosen_N, starts_V, axis=1, dtype=np.float64)
        for chosen_N in (positive_N, ~positive_N)
    )
    pairs_R = positive_RV.sum(axis=1) * negative_RV.sum(axis=1)
    won_RV = np.cumsum(negative_RV, axis=1) - negative_RV / 2
    drawn_R: NDArray[np.float64] = (positive_RV * won_RV).sum(axis=1)[pairs_R > 0] / pairs_R[pairs_R > 0]
    return drawn_R


def _times_drawn(cluster: Sequence[int], seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each score's cluster is drawn, [r, N] for r resamples at a time: few if there are many scores."""
    cluster_N = np.unique(np.asarray(cluster), return_inverse=True)[1]
    clusters = int(cluster_N.max()) + 1
    rng = np.random.default_rng(seed)
    together = max(1, COUNTS_TOGETHER // len(cluster_N))
    for start in range(0, resamples, together):
        size = min(together, resamples - start)
        flat_rC = rng.integers(0, clusters, (size, clusters)) + clusters * np.arange(size)[:, None]
        times_rC = np.bincount(flat_rC.ravel(), minlength=size * clusters).reshape(size, clusters)
        yield times_rC[:, cluster_N]
