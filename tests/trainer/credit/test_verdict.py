"""The verdict on references: which one to use, that none helps, what is worse than chance, and too few answers."""

from collections.abc import Mapping

import numpy as np
import pytest
from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.auroc import auroc, auroc_draws
from dense_reward_trainer.credit.judged_answers import JudgedAnswers
from dense_reward_trainer.credit.verdict import MIN_PROMPTS, Verdict, verdict

PROMPTS, EACH = 60, 4


def judged(shifts: Mapping[str, Mapping[Aggregate, float]], seed: int = 0, prompts: int = PROMPTS) -> JudgedAnswers:
    """Answers whose scores are normal, with a higher mean by the given shift if the answer is right."""
    rng = np.random.default_rng(seed)
    right_N = rng.random(prompts * EACH) < 0.6
    scores: dict[str, dict[Aggregate, list[float]]] = {
        column: {name: (rng.normal(size=len(right_N)) + shift * right_N).tolist() for name, shift in found.items()}
        for column, found in shifts.items()
    }
    return JudgedAnswers(right_N.tolist(), np.repeat(np.arange(prompts), EACH).tolist(), scores)


def judge(answers: JudgedAnswers) -> Verdict:
    return verdict(answers, answers.ranking(0), seed=0)


def test_the_reference_that_ranks_far_better_than_the_sft_model_alone_is_used() -> None:
    found = judge(
        judged(
            {
                "sft_logprob": {"sum": 0.5, "min": 0.3},
                "reward:base": {"sum": 1.0, "min": 3.0},
                "reward:early": {"sum": 2.0, "min": 0.0},
                "reward:reference": {"sum": 0.4, "min": 0.0},
            }
        )
    )
    assert found.use == "base"
    assert (found.control.column, found.control.aggregate) == ("sft_logprob", "sum")
    assert {pair: one.best.aggregate for pair, one in found.references.items()} == {
        "base": "min",
        "early": "sum",
        "reference": "sum",
    }
    assert [one.helps for one in found.references.values()] == [True, True, False]
    assert found.words[0].startswith("use the reference base: reward:base by min, AUROC 0.9")
    assert "(Holm, 3 references)" in found.words[0]
    assert found.words[1] == "these references help too: early"


def test_a_reference_that_ranks_as_well_as_the_sft_model_alone_does_not_help() -> None:
    found = judge(judged({"sft_logprob": {"sum": 2.0}, "reward:early": {"min": 2.0}}))
    assert found.use is None
    assert found.references["early"].difference.interval.low < 0 < found.references["early"].difference.interval.high
    assert len(found.words) == 1
    assert found.words[0].startswith("no reference helps here: the best is reward:early by min")


def test_what_ranks_wrong_above_right_is_not_trained_on() -> None:
    found = judge(judged({"sft_logprob": {"sum": -1.0, "min": -1.0}, "reward:base": {"sum": -2.0, "min": 0.0}}))
    assert found.use is None
    assert {(choice.column, choice.aggregate) for choice in found.worse_than_chance} == {
        ("sft_logprob", "sum"),
        ("sft_logprob", "min"),
        ("reward:base", "sum"),
    }
    assert "nothing here separates right from wrong answers" in found.words[1]
    assert [words.split(" (")[0] for words in found.words[2:]] == [
        "worse than chance, do not train on it: sft_logprob",
        "worse than chance, do not train on it: reward:base",
    ]


def test_a_reference_below_chance_does_not_help_although_the_sft_model_alone_is_further_below() -> None:
    found = judge(judged({"sft_logprob": {"sum": -4.0}, "reward:base": {"sum": -0.2}}))
    assert found.references["base"].difference.interval.low > 0
    assert found.use is None


def test_where_nothing_differs_a_reference_is_rarely_said_to_help() -> None:
    columns = ("sft_logprob", "entropy_corrected", "reward:a", "centred:a", "reward:b", "centred:b")
    same: dict[str, dict[Aggregate, float]] = {column: {"sum": 1.0} for column in columns}
    verdicts = [judge(judged(same, seed)) for seed in range(6)]
    assert sum(found.use is not None for found in verdicts) <= 1


def test_the_difference_is_paired_over_prompts() -> None:
    """Two scores that are equal but for little noise have a difference with a far narrower interval than their own."""
    answers = judged({"sft_logprob": {"sum": 1.0}})
    (scores,) = answers.scores["sft_logprob"].values()
    noise_N = np.random.default_rng(3).normal(size=len(scores)) * 0.01
    answers.scores["reward:early"] = {"sum": (np.array(scores) + noise_N).tolist()}
    found = judge(answers).references["early"]
    own, interval = found.best.auroc, found.difference.interval
    assert interval.low <= interval.value <= interval.high
    assert interval.high - interval.low < (own.high - own.low) / 5


def test_draws_are_the_aurocs_of_the_resampled_answers() -> None:
    answers = judged({"sft_logprob": {"sum": 1.0}}, prompts=7)
    scores = np.round(answers.scores["sft_logprob"]["sum"], 0)
    found = auroc_draws(scores.tolist(), answers.right, answers.prompt, seed=5, resamples=20)
    rng, right_N = np.random.default_rng(5), np.array(answers.right)
    for value in found:
        taken = np.concatenate([np.arange(p * EACH, (p + 1) * EACH) for p in rng.integers(0, 7, 7)])
        assert value == pytest.approx(auroc(scores[taken][right_N[taken]], scores[taken][~right_N[taken]]))


@pytest.mark.parametrize("prompts", [1, 2, MIN_PROMPTS - 1])
def test_of_too_few_prompts_there_is_no_verdict(prompts: int) -> None:
    answers = judged({"sft_logprob": {"sum": 0.0}, "reward:early": {"sum": 5.0}}, prompts=prompts)
    found = judge(answers)
    assert (found.use, found.references, found.worse_than_chance) == (None, {}, ())
    assert "raise samples, or give more prompts" in found.words[0]


def test_many_prompts_with_a_single_wrong_answer_give_no_verdict() -> None:
    answers = judged({"sft_logprob": {"sum": 0.0}, "reward:early": {"sum": 5.0}})
    only_one = JudgedAnswers([index != 3 for index in range(len(answers.right))], answers.prompt, answers.scores)
    assert judge(only_one).words[0].startswith("no verdict: 60 prompts have a right answer and 1 have a wrong one")
