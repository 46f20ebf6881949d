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


def without_spread(value: float, count: int, *, low: float = 0.0) -> Interval:
    """The 95 % interval of a mean between `low` and 1 of `count` equal values, which a sample cannot show.

    It allows for what was not seen: with N equal values, at most the share 1 - 0.05^(1/N) of all others differs (the
    "rule of three").
    """
    unseen = 1 - 0.05 ** (1 / count)
    return Interval(value, value - unseen * (value - low), value + unseen * (1 - value))


def auroc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs, the area under the ROC curve (Mann and Whitney, 1947).

    Raises ValueError if either group is empty, or if a score is nan.
    """
    high, low = _numbers(positives), _numbers(negatives)
    if not len(high) or not len(low):
        raise ValueError(f"AUROC compares two groups, but they hold {len(high)} and {len(low)} scores")
    # not mannwhitneyu: its p-value, which we do not need, warns if all scores are equal
    rank_sum = rankdata(np.concatenate([high, low]))[: len(high)].sum()
    return float((rank_sum - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def mean_interval(values: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """The mean with a percentile bootstrap interval over the values (Efron, 1979).

    Equal values, or one, are taken as shares: see `without_spread`. Raises ValueError for no value and for nan.
    """
    value_N = _numbers(values)
    if not len(value_N):
        raise ValueError("a mean needs at least one value, but there is none")
    mean = float(value_N.mean())
    if np.ptp(value_N) == 0:
        return without_spread(mean, len(value_N))
    rng = np.random.default_rng(seed)
    found = bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=rng).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def auroc_interval(
    scores: Sequence[float], positive: Sequence[bool], cluster: Sequence[int], seed: int, resamples: int = 500
) -> Interval:
    """AUROC with a percentile bootstrap interval over clusters: scores of one cluster are not independent.

    See `interval_of_draws`. Raises ValueError if either group is empty, or if a score is nan.
    """
    score_N, positive_N = _numbers(scores), np.asarray(positive, dtype=np.bool_)
    value = auroc(score_N[positive_N], score_N[~positive_N])
    return interval_of_draws(value, auroc_draws(scores, positive, cluster, seed, resamples), positive, cluster)


def interval_of_draws(
    value: float, draws_R: NDArray[np.float64], positive: Sequence[bool], cluster: Sequence[int]
) -> Interval:
    """The percentile interval of an AUROC's bootstrap draws.

    If all draws agree, as those of groups that are apart do, or if there is none, the draws show no spread. The
    interval is then that of `without_spread` for the clusters of the rarer group.
    """
    low, high = np.percentile(draws_R if len(draws_R) else [value], [2.5, 97.5])
    if low < high:
        return Interval(value, float(low), float(high))
    clusters = [{at for at, one in zip(cluster, positive, strict=True) if one == kind} for kind in (True, False)]
    return without_spread(value, min(map(len, clusters)))


def auroc_draws(
    scores: Sequence[float], positive: Sequence[bool], cluster: Sequence[int], seed: int, resamples: int
) -> NDArray[np.float64]:
    """AUROC of each bootstrap resample of the clusters that holds both groups, [R].

    Which clusters are drawn depends on `positive`, `cluster` and `seed` only. So the draws of two scores of the same
    answers are paired, and their differences are those of one resample. A resample that holds only one group has no
    AUROC and is left out. Raises ValueError if a score is nan.
    """
    value_N, place_N = np.unique(_numbers(scores), return_inverse=True)
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


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    """The values as float64. Raises ValueError for nan, which numpy would sort above every number."""
    value_N = np.asarray(values, dtype=np.float64)
    if np.isnan(value_N).any():
        raise ValueError(
            f"{int(np.isnan(value_N).sum())} of {value_N.size} values are nan: they can be neither ranked nor averaged"
        )
    return value_N
