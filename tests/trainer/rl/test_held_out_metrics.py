"""Held-out metrics of policies whose answers are known."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import pytest
import torch
from dense_reward.engines.fake import EOS_ID
from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.data.sources import ChatMessage, DataError, Demonstration
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.rl.held_out_metrics import Estimate, estimate, measure_held_out
from dense_reward_trainer.rl.policy import PolicyCheckpoint, frozen_logprobs, policy_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import PolicyRewards, tiny_checkpoint

ANSWERS = {"1+1": "#### 2", "2+2": "#### 4"}
OPTIONS = HeldOutOptions(max_new_tokens=12, samples_per_prompt=3)


def rows_of(checkpoint: PolicyCheckpoint, answers: dict[str, str | None]) -> list[TokenisedRow]:
    """The prompts with the responses of ANSWERS as demonstrations; `answers` are the right final answers."""
    demonstrations = [
        Demonstration((ChatMessage("user", prompt), ChatMessage("assistant", ANSWERS[prompt])), answer, f"here:{line}")
        for line, (prompt, answer) in enumerate(answers.items(), 1)
    ]
    encoder = checkpoint.encoder
    return list(encode_demonstrations(demonstrations, encoder, every_turn=False, limit_tokens=128, skip_bad=False).rows)


@pytest.fixture(scope="module")
def taught() -> PolicyCheckpoint:
    """A policy that was trained until it gives both of ANSWERS."""
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint, dict.fromkeys(ANSWERS))
    prompts, responses = [row.encoded.prompt_P for row in rows], [row.encoded.responses[0].ids_T for row in rows]
    optimiser = torch.optim.AdamW(checkpoint.policy.model.parameters(), lr=3e-2)
    for _ in range(150):
        optimiser.zero_grad()
        torch.autograd.backward(-policy_logprobs(checkpoint.policy, prompts, responses).mean())
        optimiser.step()
    return checkpoint


def test_a_policy_that_knows_the_answers_is_right_and_sure_and_ends_its_turn(taught: PolicyCheckpoint) -> None:
    result, samples = measure_held_out(taught, rows_of(taught, {"1+1": "2", "2+2": "4"}), OPTIONS)
    assert result.greedy_accuracy is not None
    assert result.sampled_accuracy is not None
    assert (result.greedy_accuracy.value, result.greedy_accuracy.count) == (1.0, 2)
    assert result.sampled_accuracy.value > 0.9
    assert result.nll_per_token is not None
    assert result.nll_per_token < 0.05
    assert result.length_tokens.value == pytest.approx(len("#### 2") + 1, abs=0.5)
    assert result.greedy_truncated == Estimate(0.0, 0.0, 2)
    assert result.kl_to_sft is None
    assert [(s.text, s.answer, s.source) for s in samples if s.greedy] == [
        ("#### 2", "2", "here:1"),
        ("#### 4", "4", "here:2"),
    ]
    assert len(samples) == 2 + 2 * 3


def test_another_answer_than_the_wanted_one_is_wrong(taught: PolicyCheckpoint) -> None:
    result, _ = measure_held_out(taught, rows_of(taught, {"1+1": "2", "2+2": "5"}), OPTIONS)
    assert result.greedy_accuracy is not None
    assert result.greedy_accuracy.value == 0.5
    assert result.greedy_accuracy.standard_error == pytest.approx(sqrt(0.25 / 1))


def test_a_response_that_was_cut_off_is_wrong_even_where_its_half_reads_right(taught: PolicyCheckpoint) -> None:
    """'#### 2' without its end of turn can be the start of '#### 23'."""
    short = OPTIONS.model_copy(update={"max_new_tokens": len("#### 2")})
    result, samples = measure_held_out(taught, rows_of(taught, {"1+1": "2", "2+2": "4"}), short)
    assert result.greedy_accuracy is not None
    assert result.greedy_accuracy.value == 0.0
    assert result.greedy_truncated == Estimate(1.0, 0.0, 2)
    assert [s.text for s in samples if s.greedy] == ["#### 2", "#### 4"]


def test_prompts_without_a_known_answer_do_not_count_for_accuracy(taught: PolicyCheckpoint) -> None:
    some, _ = measure_held_out(taught, rows_of(taught, {"1+1": None, "2+2": "4"}), OPTIONS)
    none, _ = measure_held_out(taught, rows_of(taught, {"1+1": None, "2+2": None}), OPTIONS)
    assert some.greedy_accuracy is not None
    assert (some.greedy_accuracy.value, some.greedy_accuracy.count) == (1.0, 1)
    assert none.greedy_accuracy is None
    assert none.numbers()["greedy_accuracy"] is None


def test_the_likelihood_is_that_of_the_demonstrations_with_their_end_of_turn() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint, {"1+1": "2", "2+2": "4"})
    prompts, responses = [row.encoded.prompt_P for row in rows], [row.encoded.responses[0].ids_T for row in rows]
    assert all(ids[-1] == EOS_ID for ids in responses)
    logprob_BT = frozen_logprobs(checkpoint.policy, prompts, responses, 512)
    result, _ = measure_held_out(checkpoint, rows, OPTIONS)
    assert result.nll_per_token == pytest.approx(-float(logprob_BT.sum()) / sum(map(len, responses)), rel=1e-6)


def test_the_kl_to_oneself_is_0_and_to_another_is_the_mean_log_ratio_of_the_samples() -> None:
    checkpoint, other = tiny_checkpoint(), tiny_checkpoint(seed=1)
    rows = rows_of(checkpoint, {"1+1": "2", "2+2": "4"})
    seen: list[Rollout] = []

    class Remembering:
        def score(self, rollouts: Sequence[Rollout], _: object = None) -> list[ResponseRewards]:
            seen.extend(rollouts)
            return PolicyRewards(other.policy).score(rollouts)

    same, _ = measure_held_out(checkpoint, rows, OPTIONS, PolicyRewards(checkpoint.policy))
    assert same.kl_to_sft is not None
    assert same.kl_to_sft.value == pytest.approx(0.0, abs=1e-5)
    different, _ = measure_held_out(checkpoint, rows, OPTIONS, Remembering())
    prompts, responses = [r.prompt_P for r in seen], [r.response_T for r in seen]
    own_B, theirs_B = (frozen_logprobs(c.policy, prompts, responses, 512).sum(1) for c in (checkpoint, other))
    assert different.kl_to_sft is not None
    assert different.kl_to_sft.value == pytest.approx(float((own_B - theirs_B).mean()), rel=1e-5)
    assert different.kl_to_sft.value > 1.0


def test_measuring_twice_gives_the_same_figures_and_disturbs_no_random_state() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint, {"1+1": "2", "2+2": "4"})
    torch.manual_seed(5)
    first = measure_held_out(checkpoint, rows, OPTIONS)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)
    assert measure_held_out(checkpoint, rows, OPTIONS) == first
    assert measure_held_out(checkpoint, rows, OPTIONS.model_copy(update={"seed": 1}))[1] != first[1]


def test_a_limit_takes_the_first_prompts(taught: PolicyCheckpoint) -> None:
    result, samples = measure_held_out(
        taught, rows_of(taught, {"1+1": "2", "2+2": "4"}), OPTIONS.model_copy(update={"limit": 1})
    )
    assert result.length_tokens.count == 1
    assert {sample.source for sample in samples} == {"here:1"}


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_held_out(tiny_checkpoint(), [], OPTIONS)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_with_one_sample_to_a_prompt_the_error_is_that_of_a_share(right: list[bool]) -> None:
    measured = estimate(right, 1)
    share = sum(right) / len(right)
    assert measured.value == pytest.approx(share)
    assert measured.standard_error == pytest.approx(sqrt(share * (1 - share) / (len(right) - 1)))


def test_samples_of_one_prompt_count_as_one_observation() -> None:
    measured = estimate([1, 1, 0, 0], 2)
    assert (measured.value, measured.count) == (0.5, 2)
    assert measured.standard_error == pytest.approx(np.std([1.0, 0.0], ddof=1) / sqrt(2))


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("-inf"), 1.0]])
def test_a_mean_of_nothing_or_of_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="a mean needs finite values"):
        estimate(values, 1)


def test_a_single_prompt_has_no_standard_error() -> None:
    assert estimate([1, 0], 2) == Estimate(0.5, None, 1)


@pytest.mark.parametrize(("checker", "right"), [("exact", [True, True]), ("last_number", [True, False])])
def test_the_checker_decides_which_answers_are_right(taught: PolicyCheckpoint, checker: str, right: list[bool]) -> None:
    """exact compares with the demonstration, whatever final answer the data state."""
    options = OPTIONS.model_copy(update={"checker": checker})
    _, samples = measure_held_out(taught, rows_of(taught, {"1+1": "2", "2+2": "5"}), options)
    assert [sample.right for sample in samples if sample.greedy] == right


def test_an_answer_that_the_checker_can_never_find_is_refused_before_sampling(taught: PolicyCheckpoint) -> None:
    options = OPTIONS.model_copy(update={"checker": "last_number"})
    with pytest.raises(DataError, match=r"here:1: the answer 'two' is no number.*set held_out_options.checker"):
        measure_held_out(taught, rows_of(taught, {"1+1": "two", "2+2": "4"}), options)
