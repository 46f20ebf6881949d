"""Which sample is chosen: the majority's answer, and power sampling by importance."""

import numpy as np
import pytest
from dense_reward_trainer.policies.choice import by_majority, by_power, by_score


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["1", "2", "2"], 1),
        (["1", "2", "2", "1"], 1),
        (["1", "2", "1", "2"], 0),
        ([None, None, None, "3"], 3),
        ([None, None], 0),
        (["1"], 0),
    ],
    ids=["most votes", "tie: second answer is complete first", "tie: first answer", "cut off", "no vote", "one"],
)
def test_the_first_sample_with_the_winning_answer_is_chosen(answers: list[str | None], chosen: int) -> None:
    assert by_majority(answers) == chosen


def test_power_resampling_draws_in_proportion_to_the_power_less_one() -> None:
    """Samples 0 and 1 with pi = 0.1 and 0.2: under power 3 their weights are 1 to 4."""
    random = np.random.default_rng(0)
    draws = [by_power(np.log([0.1, 0.2]), 3.0, random) for _ in range(4000)]
    assert np.mean(draws) == pytest.approx(0.8, abs=0.02)


def test_power_sampling_from_many_samples_is_sampling_from_the_power() -> None:
    """Three responses with pi = 0.5, 0.3, 0.2; pi^2 is proportional to 0.25, 0.09, 0.04."""
    random, probability = np.random.default_rng(1), np.array([0.5, 0.3, 0.2])
    counts = np.zeros(3)
    for _ in range(3000):
        samples = random.choice(3, size=64, p=probability)
        counts[samples[by_power(np.log(probability[samples]), 2.0, random)]] += 1
    np.testing.assert_allclose(counts / 3000, probability**2 / (probability**2).sum(), atol=0.03)


def test_log_probs_of_long_responses_do_not_underflow() -> None:
    random = np.random.default_rng(0)
    assert by_power(np.array([-9000.0, -8000.0]), 4.0, random) == 1
    assert by_power(np.array([-9000.0, -8000.0]), 1e308, random) == 1
    assert by_power(np.array([-9000.0, -8000.0]), 1e-9, random) == 0


@pytest.mark.parametrize(
    ("scores", "finished", "chosen"),
    [
        ([-3.0, -1.0, -2.0], [True, True, True], 1),
        ([-3.0, -1.0, -2.0], [True, False, True], 2),
        ([-3.0, -1.0, -2.0], [False, False, False], 1),
        ([-1.0, -1.0], [True, True], 0),
    ],
    ids=["highest", "cut off", "all cut off", "equal"],
)
def test_the_best_finished_sample_is_chosen(scores: list[float], finished: list[bool], chosen: int) -> None:
    assert by_score(scores, finished) == chosen


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")]], ids=["too few", "nan"])
def test_scores_that_cannot_be_compared_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="2 samples need as many finite scores"):
        by_score(scores, [True, True])
