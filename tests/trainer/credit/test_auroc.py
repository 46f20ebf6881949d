"""AUROC against its definition, and bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from dense_reward_trainer.credit import auroc as module
from dense_reward_trainer.credit.auroc import auroc, auroc_draws, auroc_interval, mean_interval
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


def counted(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """AUROC by its definition, pair by pair."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    return sum(wins) / len(wins)


@given(SCORES, SCORES)
def test_it_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half(
    positives: list[float], negatives: list[float]
) -> None:
    assert auroc(positives, negatives) == pytest.approx(counted(positives, negatives))


@given(SCORES, SCORES)
def test_swapping_the_groups_turns_it_over(positives: list[float], negatives: list[float]) -> None:
    assert auroc(positives, negatives) == pytest.approx(1 - auroc(negatives, positives))


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="hold 0 and 1 scores"):
        auroc([], [1.0])


def test_an_interval_holds_its_value_and_narrows_with_more_data() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=20).tolist(), rng.normal(size=2000).tolist()
    narrow, wide = mean_interval(many, seed=0), mean_interval(few, seed=0)
    assert wide.low < wide.value < wide.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_the_interval_of_a_mean_is_that_of_numpys_draws_with_its_seed() -> None:
    """A seed keeps its meaning: published intervals can be computed again."""
    value_N = np.random.default_rng(5).normal(size=40)
    means = value_N[np.random.default_rng(7).integers(0, 40, (2000, 40))].mean(axis=1)
    found = mean_interval(value_N.tolist(), seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-12)


def test_equal_values_allow_for_what_was_not_seen() -> None:
    """Of N equal values, up to 1 - 0.05^(1/N) of all others may differ: the exact bound of Clopper and Pearson."""
    found = mean_interval([1.0] * 20, seed=0)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(binomtest(20, 20).proportion_ci(0.9).low)
    one = mean_interval([0.25], seed=0)
    assert [one.low, one.high] == pytest.approx([0.0125, 0.9625])


def test_the_interval_of_groups_that_are_apart_allows_for_what_was_not_seen() -> None:
    interval = auroc_interval([2.0, 3.0, 0.0, 1.0], [True, True, False, False], [5, 6, 7, 8], seed=0)
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.05**0.5), "two clusters in each group"


@pytest.mark.parametrize(
    "use",
    [
        lambda values: mean_interval(values, seed=0),
        lambda values: auroc(values, [0.0]),
        lambda values: auroc([0.0], values),
        lambda values: auroc_draws(values, [True, False, True], [0, 1, 2], 0, 100),
    ],
)
def test_what_is_no_number_is_neither_ranked_nor_averaged(use: Callable[[list[float]], object]) -> None:
    with pytest.raises(ValueError, match="1 of 3 values are nan"):
        use([0.5, float("nan"), 0.25])


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([], seed=0)


def test_scores_of_one_cluster_are_resampled_together() -> None:
    """Four copies of each score in one cluster leave the interval unchanged; in separate clusters they narrow it."""
    rng = np.random.default_rng(2)
    score_N, positive_N = rng.normal(size=120), rng.random(120) < 0.5
    four = np.repeat(score_N, 4).tolist(), np.repeat(positive_N, 4).tolist()
    once = auroc_interval(score_N.tolist(), positive_N.tolist(), range(120), seed=0)
    together = auroc_interval(*four, np.repeat(np.arange(120), 4).tolist(), seed=0)
    apart = auroc_interval(*four, range(480), seed=0)
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.02)
    assert apart.high - apart.low < 0.65 * (once.high - once.low)


def test_a_resample_of_one_group_alone_is_left_out() -> None:
    scores, positive = [1.0, 0.0, 0.5, 2.0], [True, False, False, True]
    assert 0 < len(auroc_draws(scores, positive, [0, 1, 2, 3], 0, 500)) < 500
    assert len(auroc_draws(scores, positive, [0, 0, 0, 0], 0, 500)) == 500


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(size=60).tolist(), seed, resamples=300) for seed in range(200)]
    covered = np.mean([interval.low <= 0.0 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.99


@pytest.mark.parametrize("together", [1, 60, 200, 1000])
def test_draws_do_not_depend_on_how_many_are_in_memory_at_a_time(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    rng = np.random.default_rng(3)
    scores, positive = rng.normal(size=20).tolist(), [True, False, False, True] * 5
    cluster = [i // 3 for i in range(20)]
    whole_R = auroc_draws(scores, positive, cluster, seed=4, resamples=50)
    monkeypatch.setattr(module, "COUNTS_TOGETHER", together)
    assert auroc_draws(scores, positive, cluster, seed=4, resamples=50).tolist() == whole_R.tolist()
