"""Aggregates of an answer's signal: their values, short answers, and answers without tokens."""

from typing import get_args

import numpy as np
import pytest
from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.aggregates import aggregate
from hypothesis import given
from hypothesis import strategies as st

VALUES_T = np.array([1.0, -2.0, -4.0, 3.0, -5.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "window", "expected"),
    [("sum", 8, -7.0), ("mean", 8, -1.4), ("min", 8, -5.0), ("window_min", 2, -3.0), ("window_min", 3, -2.0)],
)
def test_an_aggregate_is_that_of_its_name(name: Aggregate, window: int, expected: float) -> None:
    assert aggregate(VALUES_T, name, window) == pytest.approx(expected)


def test_a_window_as_long_as_the_answer_or_longer_gives_its_mean_and_a_window_of_one_its_minimum() -> None:
    for window in (5, 6, 1000):
        assert aggregate(VALUES_T, "window_min", window) == pytest.approx(-1.4)
    assert aggregate(VALUES_T, "window_min", 1) == -5.0


@given(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=40), st.integers(1, 12))
def test_the_least_window_lies_between_minimum_and_mean_of_it(values: list[float], window: int) -> None:
    values_T = np.array(values, dtype=np.float32)
    least = min(float(np.mean(values[i : i + window])) for i in range(max(len(values) - window, 0) + 1))
    assert aggregate(values_T, "window_min", window) == pytest.approx(least, abs=1e-4)
    assert aggregate(values_T, "min") <= aggregate(values_T, "window_min", window) + 1e-4


def test_sums_of_long_answers_do_not_drift() -> None:
    assert aggregate(np.full(1_000_000, 0.1, dtype=np.float32), "sum") == pytest.approx(100_000.0, rel=1e-6)


def test_an_answer_without_tokens_has_a_sum_only() -> None:
    empty = np.zeros(0, dtype=np.float32)
    assert aggregate(empty, "sum") == 0.0
    for name in get_args(Aggregate):
        if name != "sum":
            with pytest.raises(ValueError, match=f"no {name}: leave it out"):
                aggregate(empty, name)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_tokens_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=rf"is {window} tokens: set it to at least 1"):
        aggregate(VALUES_T, "window_min", window)


@pytest.mark.parametrize("name", ["sum", "mean", "min", "window_min"])
def test_a_signal_that_is_no_number_is_refused(name: Aggregate) -> None:
    with pytest.raises(ValueError, match="nan at 1 of 3 tokens"):
        aggregate(np.array([0.5, np.nan, 1.0]), name)
