"""Calibration on scores that a logistic fit describes, and on scores that it does not."""

from collections.abc import Sequence

import numpy as np
import pytest
from dense_reward_trainer.credit.calibration import Calibration, calibration, logistic
from numpy.typing import ArrayLike


def judged(right: ArrayLike, wrong: ArrayLike, seed: int, clusters: Sequence[int] | None = None) -> Calibration | None:
    """The calibration of these scores; each is its own cluster unless `clusters` is given."""
    scores, label = np.concatenate([right, wrong]), np.repeat([True, False], [np.size(right), np.size(wrong)])
    return calibration(scores.tolist(), label.tolist(), range(len(scores)) if clusters is None else clusters, seed)


def test_the_fit_finds_the_probabilities_that_scores_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    scores_N = rng.normal(2.0, 3.0, 20_000)
    probability_N = 1 / (1 + np.exp(-(0.5 * scores_N - 1)))
    right_N = rng.random(len(scores_N)) < probability_N
    found = logistic(scores_N, right_N.astype(np.float64), np.array([-4.0, 2.0, 8.0]))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(0.5 * np.array([-4.0, 2.0, 8.0]) - 1))), atol=0.02)


def test_the_fit_is_the_likeliest_one() -> None:
    """At the maximum of the likelihood the residuals add up to 0, and are uncorrelated with the scores."""
    rng = np.random.default_rng(4)
    scores_N, label_N = rng.normal(-300.0, 50.0, 400), (rng.random(400) < 0.3).astype(np.float64)
    residual_N = logistic(scores_N, label_N, scores_N) - label_N
    assert float(residual_N.sum()) == pytest.approx(0, abs=1e-5)
    assert float(residual_N @ (scores_N - scores_N.mean())) == pytest.approx(0, abs=1e-3)


def test_scores_of_a_logistic_kind_are_calibrated_and_others_are_not() -> None:
    rng = np.random.default_rng(1)
    near = judged(rng.normal(1, 1, 4000), rng.normal(-1, 1, 4000), 0)
    # right at both ends and wrong in between: no probability that rises with the score fits
    ends = np.concatenate([rng.normal(-6, 0.5, 2000), rng.normal(6, 0.5, 2000)])
    far = judged(ends, rng.normal(0, 0.5, 4000), 0)
    assert near is not None
    assert far is not None
    assert near.expected_error < 0.03
    assert far.expected_error > 0.3


def test_bins_hold_as_many_and_rise() -> None:
    found = judged([1.0, 2.0, 3.0, 4.0] * 20, [0.0, 1.5, 2.5] * 20, 3)
    assert found is not None
    assert list(found.probability) == sorted(found.probability)
    assert len(found.share) == 10


def test_scores_that_separate_perfectly_do_not_break_the_fit() -> None:
    found = judged([5.0] * 10, [-5.0] * 10, 0)
    assert found is not None
    assert found.expected_error < 0.05


@pytest.mark.parametrize(("right", "wrong"), [(3, 100), (100, 3), (0, 0)])
def test_too_few_of_a_kind_cannot_be_judged(right: int, wrong: int) -> None:
    assert judged([1.0] * right, [0.0] * wrong, 0) is None


def test_scores_that_are_all_equal_say_nothing() -> None:
    found = judged([1.0] * 30, [1.0] * 10, 0)
    assert found is not None
    assert found.probability[0] == pytest.approx(0.75, abs=0.05)


def test_scores_of_one_cluster_are_never_in_both_halves() -> None:
    """Answers to one prompt can be alike: in both halves, the fit would be judged on what it was fitted on."""
    assert judged([1.0] * 50, [0.0] * 50, 0, clusters=[0] * 50 + [1] * 50) is None
