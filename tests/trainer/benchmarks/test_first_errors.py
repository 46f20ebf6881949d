"""ProcessBench's metric, by hand; thresholds of other data; and intervals over problems."""

import numpy as np
import pytest
from dense_reward_trainer.benchmarks.first_errors import accuracies, f1, first_error_counts, predicted
from dense_reward_trainer.benchmarks.thresholds import (
    Judged,
    best_threshold,
    draws_of,
    interval_of,
    judge_crossed,
    padded_values,
    problems_of,
    value_of,
)

# Three solutions by hand: the first wrong step is 1, none, 0; the last one was too long to be scored.
VALUES = padded_values([[0.0, -3.0, -5.0], [-1.0, -0.5], [-2.0, -4.0], []])
LABELS = [1, None, 0, None]


def test_the_first_drop_is_the_first_step_below_the_threshold_and_the_lowest_is_the_least_of_all() -> None:
    assert predicted(VALUES, -1.5, "first_drop").tolist() == [1, -1, 0, -2]
    assert predicted(VALUES, -1.5, "lowest").tolist() == [2, -1, 1, -2]
    assert predicted(VALUES, -10.0, "first_drop").tolist() == [-1, -1, -1, -2]


def test_f1_is_the_harmonic_mean_of_both_accuracies_and_a_solution_without_a_score_is_a_miss() -> None:
    sums = first_error_counts(LABELS, "first_drop")(VALUES, -1.5).sum(axis=0)
    error, right = accuracies(sums)
    assert (float(error), float(right)) == (1.0, 0.5)  # both errors are found; of two right ones the long one is missed
    assert f1(sums) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert f1(first_error_counts(LABELS, "lowest")(VALUES, -1.5).sum(axis=0)) == 0.0  # no error is found
    assert np.isnan(f1(np.array([0.0, 0.0, 1.0, 2.0])))  # without any error there is no F1


def test_it_is_what_the_program_of_the_benchmark_computes() -> None:
    """The last lines of code/run_eval.py of QwenLM/ProcessBench, on random predictions."""
    rng = np.random.default_rng(0)
    values = padded_values(rng.normal(size=(200, 6)).tolist())
    labels = [None if one < 0 else int(one) for one in rng.integers(-3, 6, 200).clip(-1)]
    predictions = predicted(values, -1.0, "first_drop")
    rows = [
        {"label": -1 if label is None else label, "prediction": int(step)}
        for label, step in zip(labels, predictions, strict=True)
    ]
    acc1, acc2 = (
        np.mean([row["prediction"] == row["label"] for row in rows if (row["label"] != -1) is with_error]) * 100
        for with_error in (True, False)
    )
    found = f1(first_error_counts(labels, "first_drop")(values, -1.0).sum(axis=0))
    assert found * 100 == pytest.approx(2 * acc1 * acc2 / (acc1 + acc2))


def test_the_best_threshold_separates_right_steps_from_wrong_ones() -> None:
    values = padded_values([[0.0, -3.0], [0.5, 0.1], [-4.0, 0.0], [0.2, 0.3]])
    counts = first_error_counts([1, None, 0, None], "first_drop")
    every = np.ones(4, dtype=np.bool_)
    assert f1(counts(values, best_threshold(values, every, counts, f1)).sum(axis=0)) == 1.0
    assert best_threshold(padded_values([[], []]), np.ones(2, dtype=np.bool_), first_error_counts([0, None], "lowest"),
                          f1) == 0.0  # fmt: skip


def test_no_solution_is_judged_by_a_threshold_that_was_chosen_on_its_own_half() -> None:
    """In each half the errors are at another height: crossed thresholds find none, the best of all would find half."""
    rng = np.random.default_rng(3)
    problem = np.arange(40)
    first = rng.permutation(40) % 2 == 0
    values = np.where(first, -1.0, -5.0)[:, None] + np.array([3.0, 0.0])
    counts = first_error_counts([1 if n % 4 else None for n in range(40)], "first_drop")
    judged = judge_crossed(values, problem, counts, f1, seed=3)
    of_second, of_first = judged.thresholds
    assert of_first == best_threshold(values, first, counts, f1)
    assert of_second == best_threshold(values, ~first, counts, f1)
    assert judged.counts_NK[first].tolist() == counts(values, of_second)[first].tolist()
    assert judged.counts_NK[~first].tolist() == counts(values, of_first)[~first].tolist()


def test_problems_are_resampled_whole_and_methods_with_the_same_solutions_are_paired() -> None:
    assert problems_of(["a", "b", "a"]).tolist() == [0, 1, 0]
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (60, 4)).astype(np.float64)
    judged = Judged(np.stack([counts[:, 0], np.ones(60), counts[:, 2], np.ones(60)], axis=1), np.arange(60) % 20)
    first, again = (draws_of(judged, f1, seed=1) for _ in range(2))
    assert (first == again).all()
    found = interval_of(value_of(judged, f1), first)
    assert found.low < found.value < found.high
    whole = Judged(judged.counts_NK, np.zeros(60, dtype=np.int64))
    assert np.ptp(draws_of(whole, f1, seed=1)) == pytest.approx(0.0)
