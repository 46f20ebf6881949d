"""Results of the benchmarks: a row for each way to judge, beside the best one of the SFT model alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dense_reward_trainer.benchmarks.first_errors import RULES, accuracies, f1, first_error_counts
from dense_reward_trainer.benchmarks.prm_bench import ONLY_RIGHT, JudgedSteps, both_f1, prm_score, step_counts
from dense_reward_trainer.benchmarks.reward_bench_2 import Choice, best_of_n, ties_score
from dense_reward_trainer.benchmarks.scored import STEP_VALUES, ResponseScores, StepScores
from dense_reward_trainer.benchmarks.thresholds import (
    Floats,
    Judged,
    Metric,
    best_threshold,
    draws_of,
    interval_of,
    judge,
    judge_crossed,
    padded_values,
    problems_of,
    value_of,
)
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.judged_answers import AGGREGATES
from dense_reward_trainer.credit.references import pair_of
from dense_reward_trainer.data.process_labels import Solution

LEVEL, ROUNDING = 0.05, 1e-12
CROSSED = "each half of the problems by thresholds chosen on the other half"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to judge. `value`: how the signals of tokens become one number; `rule`: how numbers become a judgement."""

    column: str
    value: str
    rule: str

    @property
    def is_control(self) -> bool:
        """Whether it needs the SFT model alone."""
        return pair_of(self.column) is None

    def __str__(self) -> str:
        return f"{self.column} by {self.value}" + (f", {self.rule}" if self.rule else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one benchmark: the metric with its 95 % interval over problems, and what it is computed from.

    `against_control`: the difference to the table's control; the intervals of a table hold for all its rows at once
    (max-T bootstrap, Westfall and Young, 1993). null for methods of the SFT model alone.
    """

    method: Method
    metric: Interval
    parts: dict[str, float]
    thresholds: tuple[float, ...]
    against_control: Interval | None


@dataclass(frozen=True, slots=True)
class Table:
    """`control`: the best row of the SFT model alone, null without one. `too_long`: rows of the file not scored.

    `judged_by`: which data the thresholds were chosen on.
    """

    name: str
    metric: str
    judged_by: str
    count: int
    too_long: int
    control: Method | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """A method's metric, its bootstrap draws [R], and the other columns of its row."""

    method: Method
    value: float
    draws_R: Floats
    parts: dict[str, float]
    thresholds: tuple[float, ...] = ()


def first_error_tables(
    splits: Mapping[str, tuple[Sequence[Solution], StepScores]], threshold_split: str | None, seed: int
) -> list[Table]:
    """A table of each split, and of their average if there are several. `threshold_split`: see the configuration."""
    found: dict[str, list[_Measured]] = {name: [] for name in splits}
    problems = {name: problems_of([one.problem for one in solutions]) for name, (solutions, _) in splits.items()}
    for method in _step_methods(next(iter(splits.values()))[1], RULES):
        values = {name: _values(scores, method) for name, (_, scores) in splits.items()}
        counts = {
            name: first_error_counts([one.first_wrong for one in solutions], rule)
            for name, (solutions, _) in splits.items()
            for rule in RULES
            if rule == method.rule
        }
        threshold = None
        if threshold_split is not None:
            every_N = np.ones(len(values[threshold_split]), dtype=np.bool_)
            threshold = best_threshold(values[threshold_split], every_N, counts[threshold_split], f1)
        for name in splits:
            judged = (
                judge_crossed(values[name], problems[name], counts[name], f1, seed)
                if threshold is None
                else judge(values[name], problems[name], counts[name], threshold)
            )
            found[name].append(_measured(method, judged, f1, seed, _accuracies(judged)))
    by = CROSSED if threshold_split is None else f"thresholds chosen on {threshold_split}"
    tables = [
        _table((name, "F1", by), found[name], len(solutions), scores.too_long)
        for name, (solutions, scores) in splits.items()
    ]
    if len(splits) > 1:
        count, too_long = (sum(getattr(one, key) for one in tables) for key in ("count", "too_long"))
        tables.append(
            _table(("average", "F1", by), [_mean(rows) for rows in zip(*found.values(), strict=True)], count, too_long)
        )
    return tables


def prm_bench_table(solutions: Sequence[JudgedSteps], scores: StepScores, seed: int) -> Table:
    """PRMScore, and that of each category; each half of the problems has the threshold of the other."""
    problem_N = problems_of([one.origin for one in solutions])
    counts = step_counts(solutions)
    category_N = np.array([one.category for one in solutions])

    def parts(judged: Judged) -> dict[str, float]:
        right, wrong = both_f1(judged.counts_NK.sum(axis=0))
        found = {"F1": float(right), "negative F1": float(wrong)}
        for category in dict.fromkeys(category_N.tolist()):
            sums_K = judged.counts_NK[category_N == category].sum(axis=0)
            found[category] = float(both_f1(sums_K)[0] if category == ONLY_RIGHT else prm_score(sums_K))
        return found

    measured = []
    for method in _step_methods(scores, ("every step",)):
        judged = judge_crossed(_values(scores, method), problem_N, counts, prm_score, seed)
        measured.append(_measured(method, judged, prm_score, seed, parts(judged)))
    return _table(("prm_bench", "PRMScore", CROSSED), measured, len(solutions), scores.too_long)


def reward_bench_2_table(choices: Sequence[Choice], scores: ResponseScores, seed: int) -> Table:
    """Best-of-4 accuracy, the mean over the subsets except Ties; each subset, Ties and the leaderboard's score."""
    subsets = [*dict.fromkeys(one.subset for one in choices if not one.is_tie)]
    ties = [n for n, one in enumerate(choices) if one.is_tie]
    measured = []
    for column, by_name in scores.values.items():
        for name in AGGREGATES:
            rows = by_name[name]
            counts_NK = np.zeros((len(choices), 2 * len(subsets)))
            for n, (one, values) in enumerate(zip(choices, rows, strict=True)):
                if not one.is_tie:
                    at = 2 * subsets.index(one.subset)
                    counts_NK[n, at : at + 2] = best_of_n(values) if values else 0.0, 1.0
            judged = Judged(counts_NK, np.arange(len(choices)))
            parts = _subset_parts(judged, subsets)
            scored = [n for n in ties if rows[n]]
            if ties:
                parts["Ties"] = ties_score([choices[n] for n in scored], [rows[n] for n in scored])
                parts["leaderboard score"] = float(np.mean(list(parts.values())))
            measured.append(_measured(Method(column, name, ""), judged, _mean_accuracy, seed, parts))
    return _table(("reward_bench_2", "best-of-4 accuracy", "no threshold"), measured, len(choices), scores.too_long)


def _subset_parts(judged: Judged, subsets: Sequence[str]) -> dict[str, float]:
    sums_K = judged.counts_NK.sum(axis=0)
    return {name: float(sums_K[2 * k] / sums_K[2 * k + 1]) for k, name in enumerate(subsets)}


def _mean_accuracy(sums_K: Floats) -> Floats:
    """Mean over subsets of hits / rows, [...]; a subset that a resample did not draw is left out."""
    hits, rows = sums_K[..., 0::2], sums_K[..., 1::2]
    drawn = rows > 0
    found: Floats = (hits / np.where(drawn, rows, 1.0)).sum(axis=-1) / np.maximum(drawn.sum(axis=-1), 1)
    return found


def _step_methods(scores: StepScores, rules: Sequence[str]) -> list[Method]:
    return [Method(column, how, rule) for column in scores.values for how in STEP_VALUES for rule in rules]


def _values(scores: StepScores, method: Method) -> Floats:
    by_value = {str(how): rows for how, rows in scores.values[method.column].items()}
    return padded_values(by_value[method.value])


def _accuracies(judged: Judged) -> dict[str, float]:
    error, right = accuracies(judged.counts_NK.sum(axis=0))
    return {"error accuracy": float(error), "correct accuracy": float(right)}


def _measured(method: Method, judged: Judged, metric: Metric, seed: int, parts: dict[str, float]) -> _Measured:
    return _Measured(method, value_of(judged, metric), draws_of(judged, metric, seed), parts, judged.thresholds)


def _mean(rows: Sequence[_Measured]) -> _Measured:
    """One method's mean over splits, whose resamples are independent."""
    draws_R = np.mean([one.draws_R for one in rows], axis=0)
    return _Measured(rows[0].method, float(np.mean([one.value for one in rows])), draws_R, {})


def _table(title: tuple[str, str, str], measured: Sequence[_Measured], count: int, too_long: int) -> Table:
    controls = [one for one in measured if one.method.is_control]
    control = max(controls, key=lambda one: one.value, default=None)
    differences = {} if control is None else _differences([one for one in measured if one not in controls], control)
    rows = tuple(
        Row(
            one.method,
            interval_of(one.value, one.draws_R),
            one.parts,
            one.thresholds,
            differences.get(one.method),
        )
        for one in measured
    )
    return Table(*title, count, too_long, None if control is None else control.method, rows)


def _differences(measured: Sequence[_Measured], control: _Measured) -> dict[Method, Interval]:
    """The difference of each method to the control; the intervals hold for all of them at once."""
    if not measured:
        return {}
    value_M = np.array([one.value - control.value for one in measured])
    draws_MR = np.array([one.draws_R - control.draws_R for one in measured])
    draws_MR = draws_MR[:, ~np.isnan(draws_MR).any(axis=0)]  # a resample can lack solutions with an error
    error_M = draws_MR.std(axis=1)
    largest_R = (np.abs(draws_MR - value_M[:, None]) / np.maximum(error_M, ROUNDING)[:, None]).max(axis=0)
    half_M = np.quantile(largest_R, 1 - LEVEL) * error_M
    return {
        one.method: Interval(float(value), float(value - half), float(value + half))
        for one, value, half in zip(measured, value_M, half_M, strict=True)
    }
