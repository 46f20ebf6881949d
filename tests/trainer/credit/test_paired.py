"""Intervals and p-values over seeds against tables and exact values; Holm's correction against its definition."""

import numpy as np
import pytest
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import (
    bounded_interval,
    compare,
    holm,
    in_words,
    paired_interval,
    paired_p,
    share_interval,
)
from hypothesis import given
from hypothesis import strategies as st

P_VALUES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.floats(0, 1), max_size=8)


def test_an_interval_is_students() -> None:
    found = paired_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - found.value == found.value - found.low == pytest.approx(4.30265 / 3**0.5)


def test_a_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [paired_interval(rng.normal(0.3, 2.0, 5).tolist()) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.97


def test_the_interval_and_the_p_value_agree_about_5_percent() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = rng.normal(0.5, 1.0, 8).tolist()
        found = paired_interval(values)
        assert (found.low > 0 or found.high < 0) == (paired_p(values) < 0.05)


def test_the_bootstrap_of_skewed_values_follows_their_skew_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(2).exponential(size=30).tolist()
    found = paired_interval(values, "bca")
    assert found == paired_interval(values, "bca")
    assert found != paired_interval(values, "bca", seed=1)
    assert found.high - found.value > 1.2 * (found.value - found.low)
    assert min(values) < found.low < found.value < found.high < max(values)


@pytest.mark.parametrize("method", ["t", "bca"])
def test_equal_values_are_a_point_and_are_printed_as_such(method: str) -> None:
    # 0.6 - 0.5 and 0.9 - 0.8 differ in the last digits
    found = paired_interval([0.6 - 0.5, 0.9 - 0.8, 0.1], "t" if method == "t" else "bca")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert in_words(found) == "0.100 (no spread)"
    assert in_words(Interval(0.1, 0.05, 0.15)) == "0.100 [0.050, 0.150]"
    assert in_words(Interval(-1e-4, -0.2, 0.2)) == "0.000 [-0.200, 0.200]"


def test_equal_differences_have_the_p_value_of_the_exact_test() -> None:
    assert paired_p([0.0, 0.0, 0.0]) == 1.0
    assert paired_p([0.1] * 5) == 2 / 2**5
    assert paired_p([-0.1] * 5) == 2 / 2**5


@pytest.mark.parametrize(
    ("values", "method", "complaint"),
    [
        ([], "t", "at least two seeds, but there are 0: add seeds"),
        ([1.0], "t", "at least two seeds, but there are 1: add seeds"),
        ([1.0, 2.0], "bca", "at least three seeds, but there are 2: add seeds"),
        ([1.0, float("nan")], "t", "finite values"),
        ([1.0, float("inf"), 2.0], "bca", "finite values"),
    ],
)
def test_values_that_have_no_interval_are_refused(values: list[float], method: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        paired_interval(values, "t" if method == "t" else "bca")


def test_one_seed_has_no_p_value() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        paired_p([0.5])


def test_the_interval_of_a_share_ends_where_shares_end() -> None:
    shares = [0.985, 1.0, 1.0]
    free, found = paired_interval(shares), share_interval(shares)
    assert free.high > 1 == found.high
    assert (found.value, found.low) == (free.value, free.low)
    assert share_interval([0.0, 0.0, 0.02]).low == 0
    assert share_interval([0.4, 0.5]) == Interval(0.45, 0.0, 1.0)
    assert bounded_interval([-3.0, 0.9, 1.0], -float("inf"), 1.0).high == 1
    with pytest.raises(ValueError, match=r"1\.2 is not between 0 and 1"):
        share_interval([0.5, 1.2])


def test_holms_correction_of_a_known_family() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({}) == {}
    assert holm({"only": 0.2}) == {"only": 0.2}


@given(P_VALUES)
def test_holms_correction_keeps_the_order_and_lies_between_none_and_bonferronis(p_values: dict[str, float]) -> None:
    found = holm(p_values)
    assert list(found) == list(p_values)
    for name, p in p_values.items():
        assert p <= found[name] <= min(1.0, len(p_values) * p)
        assert all(found[name] <= found[other] for other, q in p_values.items() if p < q)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_number_that_is_no_p_value_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="the p-value of b is"):
        holm({"a": 0.5, "b": p})


def test_a_comparison_counts_all_that_are_shown() -> None:
    sure, unsure = [0.1, 0.11, 0.12, 0.1], [0.1, -0.1, 0.05, 0.0]
    found = compare({"sure": sure, "unsure": unsure})
    assert found["sure"].p == paired_p(sure) < 0.01
    assert found["sure"].p_holm == 2 * found["sure"].p
    assert found["unsure"].p_holm == found["unsure"].p
    assert found["unsure"].interval == paired_interval(unsure)
