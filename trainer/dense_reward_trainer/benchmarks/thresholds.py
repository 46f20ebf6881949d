"""Metrics that need a threshold: the best one, judging with one of other data, and bootstrap intervals. Pure numpy.

A benchmark is two functions. `counts` says of every solution what its steps add to the benchmark's counts, given the
values of its steps [N, S] (nan after its last step, and in a whole row that was not scored) and a threshold; a value
below the threshold says "wrong". `metric` computes the metric from sums of counts [..., K]. So a resample of the
solutions costs one sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.credit.auroc import Interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]
Counts = Callable[[Floats, float], Floats]
Metric = Callable[[Floats], Floats]
CANDIDATES, RESAMPLES = 256, 2000


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Solutions after a threshold: their counts [N, K], their problems [N], and the threshold, or that of each half."""

    counts_NK: Floats
    problem_N: Indices
    thresholds: tuple[float, ...] = ()


def padded_values(values: Sequence[Sequence[float]]) -> Floats:
    """[N, S], nan after the last value of each."""
    found_NS = np.full((len(values), max(map(len, values), default=0)), np.nan)
    for n, row in enumerate(values):
        found_NS[n, : len(row)] = row
    return found_NS


def best_threshold(values_NS: Floats, chosen_N: Bools, counts: Counts, metric: Metric) -> float:
    """The threshold with the highest metric on the chosen solutions, the lowest of equals.

    Candidates are the quantiles of the values, at most 256, and one above them all. With a value below the threshold
    a step is wrong, so the lowest candidate calls no step wrong.
    """
    known = values_NS[chosen_N]
    known = known[~np.isnan(known)]
    if not len(known):
        return 0.0
    candidates = np.unique(np.quantile(known, np.linspace(0, 1, CANDIDATES)))
    candidates = np.append(candidates, np.nextafter(candidates[-1], np.inf))
    scores = [float(metric(counts(values_NS, one)[chosen_N].sum(axis=0))) for one in candidates]
    return float(candidates[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))])


def judge(values_NS: Floats, problem_N: Indices, counts: Counts, threshold: float) -> Judged:
    """The solutions, judged with a threshold of other data."""
    return Judged(counts(values_NS, threshold), problem_N, (threshold,))


def judge_crossed(values_NS: Floats, problem_N: Indices, counts: Counts, metric: Metric, seed: int) -> Judged:
    """Each half of the problems, drawn by `seed`, judged with the threshold that is best on the other half."""
    first_P: Bools = np.random.default_rng(seed).permutation(int(problem_N.max()) + 1) % 2 == 0
    first_N = first_P[problem_N]
    of_first, of_second = (best_threshold(values_NS, half_N, counts, metric) for half_N in (first_N, ~first_N))
    counts_NK = np.where(first_N[:, None], counts(values_NS, of_second), counts(values_NS, of_first))
    return Judged(counts_NK, problem_N, (of_second, of_first))


def value_of(judged: Judged, metric: Metric) -> float:
    """The metric of all solutions."""
    return float(metric(judged.counts_NK.sum(axis=0)))


def draws_of(judged: Judged, metric: Metric, seed: int) -> Floats:
    """The metric of each bootstrap resample of the problems, [R]. Methods judged on the same solutions are paired."""
    problems = int(judged.problem_N.max()) + 1
    by_problem_PK = np.zeros((problems, judged.counts_NK.shape[1]))
    np.add.at(by_problem_PK, judged.problem_N, judged.counts_NK)
    rng = np.random.default_rng(seed)
    times_RP = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
    return metric(times_RP @ by_problem_PK)


def interval_of(value: float, draws_R: Floats) -> Interval:
    """The value with its 95 % percentile interval; draws that are nan, such as those of one class, are left out."""
    low, high = np.nanpercentile(draws_R, [2.5, 97.5]) if not np.isnan(draws_R).all() else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def problems_of(problems: Sequence[str]) -> Indices:
    """An index for each different problem, [N], in the order of their first solution."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(one, len(known)) for one in problems], dtype=np.int64)
