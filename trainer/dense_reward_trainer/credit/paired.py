"""Means over seeds, and paired differences: 95 % intervals, p-values, and Holm's correction for several comparisons.

A value belongs to a seed (or to another independent cluster, such as a prompt). To compare two methods, take their
difference within every seed first: what a seed does to both then cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dense_reward_trainer.credit.auroc import Interval

Method = Literal["t", "bca"]
RESAMPLES = 9999
# values that differ by less than this part of the largest are equal but for rounding
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference with its interval; p-values of "the difference is 0", alone and among all comparisons.

    `interval` is that of this comparison alone. `p_holm` is the p-value to quote if several comparisons are shown.
    """

    interval: Interval
    p: float
    p_holm: float


def paired_interval(differences: Sequence[float], method: Method = "t", seed: int = 0) -> Interval:
    """The mean of one value per seed, with a 95 % interval for it.

    `t`: Student's t; right for any number of seeds if the values are about normal. `bca`: the bias-corrected and
    accelerated bootstrap (Efron, 1987) with draws of `seed`, for skewed values; too narrow below about 10 values.
    Values that are all equal give a point, which is no interval: print it with `in_words`.

    Raises ValueError for fewer than two values (three with `bca`) and for values that are not finite.
    """
    value_N = _checked(differences, least=3 if method == "bca" else 2)
    mean = float(value_N.mean())
    if _all_equal(value_N):
        return Interval(mean, mean, mean)
    if method == "t":
        half = float(stats.t.ppf(0.975, len(value_N) - 1) * stats.sem(value_N))
        return Interval(mean, mean - half, mean + half)
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((value_N,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng).confidence_interval
    if not np.isfinite([found.low, found.high]).all():
        raise ValueError(f"BCa has no interval for {list(differences)}: add seeds, or use the method t")
    return Interval(mean, float(found.low), float(found.high))


def bounded_interval(
    values: Sequence[float], least: float, most: float, method: Method = "t", seed: int = 0
) -> Interval:
    """`paired_interval` of values that cannot lie beyond `least` and `most`: the part of it between them.

    No mean of such values lies beyond, so leaving that part out takes nothing from the interval's coverage. Raises
    ValueError also for a value beyond.
    """
    beyond = [value for value in values if not least <= value <= most]
    if beyond:
        raise ValueError(f"{beyond[0]} is not between {least:g} and {most:g}: use paired_interval")
    found = paired_interval(values, method, seed)
    return Interval(found.value, max(found.low, least), min(found.high, most))


def share_interval(shares: Sequence[float], method: Method = "t", seed: int = 0) -> Interval:
    """`bounded_interval` of shares, such as accuracies. A difference of shares has another range: `paired_interval`."""
    return bounded_interval(shares, 0.0, 1.0, method, seed)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of "the mean difference is 0", by the paired t-test.

    Equal differences have no variance, so t has no value: the p-value is 1 if all are 0, otherwise 2^(1 - N), that of
    the exact test that flips signs. Raises ValueError for fewer than two values and for values that are not finite.
    """
    value_N = _checked(differences, least=2)
    if _all_equal(value_N):
        return float(2.0 ** (1 - len(value_N))) if value_N.any() else 1.0
    return float(stats.ttest_1samp(value_N, 0.0).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm, 1979): below 0.05, a comparison stands at 5 % for all comparisons together.

    The k-th smallest of m p-values is multiplied by m - k + 1; none becomes smaller than one before it, or larger than
    1. Keeps the order of the names. Raises ValueError for a p-value that is not between 0 and 1.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value of {name} is {p}, but must be between 0 and 1")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compare(differences: Mapping[str, Sequence[float]], method: Method = "t", seed: int = 0) -> dict[str, Comparison]:
    """Every comparison's interval and p-values; Holm's correction counts all of them."""
    alone = {name: paired_p(found) for name, found in differences.items()}
    together = holm(alone)
    return {
        name: Comparison(paired_interval(found, method, seed), alone[name], together[name])
        for name, found in differences.items()
    }


def in_words(found: Interval, digits: int = 3) -> str:
    """`0.310 [0.280, 0.340]`, or `0.310 (no spread)` if all seeds gave the same value, so that there is no interval."""
    value, low, high = (f"{number:z.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} (no spread)" if found.low == found.high else f"{value} [{low}, {high}]"


def _checked(values: Sequence[float], least: int) -> NDArray[np.float64]:
    value_N = np.asarray(values, dtype=np.float64)
    if value_N.ndim != 1:
        raise ValueError(f"one value per seed is needed, but the values have the shape {value_N.shape}")
    if len(value_N) < least:
        raise ValueError(f"an interval needs at least {_NUMBERS[least]} seeds, but there are {len(value_N)}: add seeds")
    if not np.isfinite(value_N).all():
        raise ValueError(f"an interval needs finite values, but some of {value_N.tolist()} are not")
    return value_N


def _all_equal(value_N: NDArray[np.float64]) -> bool:
    return bool(np.ptp(value_N) <= ROUNDING * np.abs(value_N).max())


_NUMBERS = {2: "two", 3: "three"}
