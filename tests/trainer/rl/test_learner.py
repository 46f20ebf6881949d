"""One step of learning on a tiny policy: the gradient of an update, candidates, reuse, the KL controller, averaging."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from dense_reward.engines.fake import EOS_ID, VOCABULARY
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import QUANTITIES, ComputeOptions, PairEngine
from dense_reward.records import EngineInfo, IdArray
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.advantages import action_advantages, token_returns
from dense_reward_trainer.rl.batch_metrics import describe
from dense_reward_trainer.rl.learner import Learner, kl_factor, seed_of
from dense_reward_trainer.rl.optimiser import learning_rate
from dense_reward_trainer.rl.policy import Policy, policy_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import EngineRewards, PolicyRewards, tiny_llama, tiny_policy
from tiny_training import PROMPTS, batch_of, config_of, weights_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_update_follows_the_gradient_at_the_sampling_temperature(temperature: float) -> None:
    policy = tiny_policy(dtype=torch.float64)
    config = config_of(temperature=temperature, max_grad_norm=1e9)
    batch = batch_of(policy, config)
    weighed = action_advantages(batch, config, config.kl_coefficient)
    norm = Learner.of(config, policy).update(batch, weighed)["grad_norm"]
    own = [parameter.grad.clone() for parameter in policy.model.parameters() if parameter.grad is not None]

    fresh = tiny_policy(dtype=torch.float64)
    objective = torch.zeros((), dtype=torch.float64)
    for rollout, advantage_T in zip(batch.rollouts, weighed.advantage_BTM[..., 0], strict=True):
        logits_LV = fresh.model(torch.tensor([[*rollout.prompt_P, *rollout.response_T]])).logits[0]
        for t, token in enumerate(rollout.response_T.tolist()):
            state_V = logits_LV[len(rollout.prompt_P) + t - 1] / temperature
            objective = objective + advantage_T[t] * torch.log_softmax(state_V, -1)[token]
    expected = torch.autograd.grad(-objective / len(batch.rollouts), list(fresh.model.parameters()))
    for own_gradient, expected_gradient in zip(own, expected, strict=True):
        torch.testing.assert_close(own_gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-6)


def test_rewards_and_the_penalty_are_at_temperature_1_whatever_is_sampled_at() -> None:
    policy = tiny_policy()
    config = config_of(temperature=0.5, kl_coefficient=0.25, baseline="none")
    batch = batch_of(policy, config)
    prompts, responses = [r.prompt_P for r in batch.rollouts], [r.response_T for r in batch.rollouts]
    at_1_BT = policy_logprobs(policy, prompts, responses, temperature=1.0).detach()
    torch.testing.assert_close(batch.policy_logprob_BT, at_1_BT, rtol=0, atol=1e-4)
    shaped_BT = batch.signal_BT - 0.25 * (at_1_BT - batch.sft_logprob_BT)
    expected_B = (shaped_BT * batch.mask_BT).sum(1).double()
    torch.testing.assert_close(token_returns(batch, config, 0.25)[:, 0], expected_B, rtol=0, atol=1e-3)


def test_before_the_first_step_the_kl_to_the_sft_model_is_0_also_where_its_output_rows_are_padded() -> None:
    """Half of the output rows have no id in the tokenizer; the policy and the service both normalise over them."""
    model, sft, reference = (tiny_llama(seed=seed, vocab_size=2 * VOCABULARY) for seed in (0, 0, 1))
    info = EngineInfo("sft", "reference", "r", "float32", "cpu", VOCABULARY, 128, QUANTITIES, related=True)
    service = PairEngine(TorchModel(sft), TorchModel(reference), info, ComputeOptions(1000))
    config = config_of()
    batch = batch_of(Policy(model, EOS_ID, VOCABULARY), config, EngineRewards(engine=service))
    assert describe(batch, token_returns(batch, config, 0.1))["kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(batch.policy_logprob_BT, batch.sft_logprob_BT, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"candidates": 3, "updates_per_batch": 2}, {"kl_penalty": "loss_k3"}], ids=["plain", "reused", "k3"]
)
def test_an_update_does_not_depend_on_the_size_of_microbatches(options: dict[str, object]) -> None:
    after = []
    for tokens in (1, 24, 10_000):
        policy = tiny_policy(dtype=torch.float64)
        config = config_of(microbatch_tokens=tokens, **options)
        batch = batch_of(policy, config)
        Learner.of(config, policy).update(batch, action_advantages(batch, config, 0.1))
        after.append(torch.cat([weight.flatten() for weight in weights_of(policy)]))
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(after[0], after[2], rtol=0, atol=1e-8)


@dataclass(slots=True)
class Remembering:
    """A reward of 1 for every id, and of 100 for an end of turn; remembers the rollouts that it scored."""

    end_of_turn_id: int
    scored: list[Rollout]

    def score(self, rollouts: Sequence[Rollout], _: object = None) -> list[ResponseRewards]:
        self.scored.extend(rollouts)
        rows = [np.where(r.response_T == self.end_of_turn_id, 100.0, 1.0).astype(np.float32) for r in rollouts]
        return [ResponseRewards(row, np.zeros_like(row)) for row in rows]


def test_a_response_that_was_cut_off_gets_no_reward_for_an_end_of_turn() -> None:
    policy = tiny_policy()
    policy.model.lm_head.weight.data[policy.end_of_turn_id] *= 3.0
    config = config_of(group_size=16, kl_coefficient=0.0, baseline="none")
    rewards = Remembering(policy.end_of_turn_id, [])
    batch = batch_of(policy, config, rewards)
    return_BT = token_returns(batch, config, 0.0)
    assert {rollout.finished for rollout in rewards.scored} == {True, False}
    for rollout, return_T in zip(batch.rollouts, return_BT, strict=True):
        length = len(rollout.response_T)
        assert return_T[0] == (99 + length if rollout.finished else length)
        assert return_T[length - 1] == (100 if rollout.finished else 1)
        assert not return_T[length:].any()
    scored = [rollout.response_T.tolist() for rollout in rewards.scored]
    assert scored == [rollout.response_T.tolist() for rollout in batch.rollouts]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str) -> None:
    config = config_of(steps=10, warmup_steps=4, schedule=schedule, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(1, 11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx({"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule])
    assert rates[9] > 0


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 50))
def test_every_step_has_samples_of_its_own(seed: int, step: int) -> None:
    assert seed_of(seed, step) == seed_of(seed, step)
    assert seed_of(seed, step) not in (seed_of(seed, step + 1), seed_of(seed + 1, step))


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_the_weights() -> None:
    policy, config = tiny_policy(), config_of()
    batch = batch_of(policy, config)
    before, weighed = weights_of(policy), action_advantages(batch, config, 0.1)
    with pytest.raises(JobError, match="training has diverged"):
        Learner.of(config, policy).update(batch, replace(weighed, advantage_BTM=weighed.advantage_BTM * math.inf))
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights_of(policy), before, strict=True))


@dataclass(slots=True)
class RememberingCandidates:
    """The fake engine's rewards; remembers the candidates that it scored."""

    candidates: list[IdArray]

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        self.candidates.extend(candidates or ())
        return EngineRewards().score(rollouts, candidates)


def test_candidates_are_the_likeliest_ids_that_the_tokenizer_knows() -> None:
    policy = replace(tiny_policy(), vocab_size=40)
    config, rewards = config_of(candidates=4), RememberingCandidates([])
    batch = batch_of(policy, config, rewards)
    assert batch.candidates is not None
    for b, (rollout, ids_TK) in enumerate(zip(batch.rollouts, rewards.candidates, strict=True)):
        for t, ids_K in enumerate(ids_TK.tolist()):
            state = torch.tensor([[*rollout.prompt_P, *rollout.response_T[:t]]])
            logprobs_V = torch.log_softmax(policy.model(state).logits[0, -1].detach(), -1)
            assert ids_K == logprobs_V[:40].topk(4).indices.tolist()
            torch.testing.assert_close(
                batch.candidates.policy_logprob_BTK[b, t], logprobs_V[ids_K], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_all_candidates_and_the_sample_teach_what_the_samples_teach_on_average(baseline: str) -> None:
    """The gradient over many samples: with candidates it must point where the sampled one does."""
    policy = tiny_policy(dtype=torch.float64)
    means = []
    for candidates in (0, 8):
        config = config_of(
            candidates=candidates, baseline=baseline, group_size=200, max_grad_norm=1e9, steps=7, microbatch_tokens=2048
        )
        batch = batch_of(policy, config)
        learner = Learner.of(config, replace(policy, model=copy.deepcopy(policy.model)))
        learner.update(batch, action_advantages(batch, config, 0.1))
        gradients = [p.grad.flatten() for p in learner.policy.model.parameters() if p.grad is not None]
        means.append(torch.cat(gradients))
    assert torch.cosine_similarity(means[0], means[1], dim=0) > 0.9


def test_a_batch_is_used_as_often_as_asked_and_clipping_bounds_how_far_it_carries() -> None:
    distance = {}
    for times, clip in ((1, 0.2), (8, 0.2), (8, None)):
        policy = tiny_policy(dtype=torch.float64)
        config = config_of(updates_per_batch=times, ratio_clip=clip, learning_rate=3e-3, kl_coefficient=0.0)
        batch = batch_of(policy, config)
        Learner.of(config, policy).update(batch, action_advantages(batch, config, 0.0))
        prompts, responses = [r.prompt_P for r in batch.rollouts], [r.response_T for r in batch.rollouts]
        now_BT = policy_logprobs(policy, prompts, responses).detach()
        distance[times, clip] = float(((now_BT - batch.policy_logprob_BT) * batch.mask_BT).abs().sum())
    assert distance[1, 0.2] < distance[8, 0.2] < distance[8, None]


def test_the_kl_coefficient_is_steered_towards_its_target() -> None:
    assert kl_factor(1.1, 1.0, 0.5) == pytest.approx(1.05)
    assert kl_factor(9.0, 1.0, 0.5) == pytest.approx(1.1)
    assert kl_factor(0.0, 1.0, 0.5) == pytest.approx(0.9)
    config = config_of(kl_target=0.5, kl_coefficient=1.0)
    learner = Learner.of(config, tiny_policy())
    first = learner.step(1, PROMPTS, PolicyRewards(tiny_policy()))
    assert first["kl_coefficient"] == 1.0
    assert learner.step(2, PROMPTS, PolicyRewards(tiny_policy()))["kl_coefficient"] == pytest.approx(0.98)


def test_the_result_is_the_moving_average_of_the_weights() -> None:
    config = config_of(average_decay=0.25, learning_rate=1e-2)
    learner = Learner.of(config, tiny_policy(dtype=torch.float64))
    expected = weights_of(learner.policy)
    for step in (1, 2, 3):
        learner.step(step, PROMPTS, EngineRewards())
        pairs = zip(expected, weights_of(learner.policy), strict=True)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = [decay * before + (1 - decay) * now for before, now in pairs]
    for found, weight in zip(weights_of(learner.result), expected, strict=True):
        torch.testing.assert_close(found, weight)
    assert not torch.equal(weights_of(learner.result)[0], weights_of(learner.policy)[0])
