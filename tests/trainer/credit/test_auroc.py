"""AUROC against its definition, and bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
import pytest
from dense_reward_trainer.credit import auroc as module
from dense_reward_trainer.credit.auroc import auroc, auroc_draws, auroc_interval, mean_interval
from hypothesis import given
from hypothesis import strategies as st

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


def test_the_interval_of_one_value_is_a_point() -> None:
    found = mean_interval([0.25], seed=0)
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_interval_of_groups_that_are_apart_is_a_point() -> None:
    interval = auroc_interval([2.0, 3.0, 0.0, 1.0], [True, True, False, False], [5, 6, 7, 8], seed=0)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


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
    interval = auroc_interval([1.0, 0.0], [True, False], [0, 1], seed=0)
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert auroc_interval([1.0, 0.0], [True, False], [0, 0], seed=0).low == 1.0


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
