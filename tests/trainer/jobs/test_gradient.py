"""The direction of DPR's gradient: that it is the run's gradient, and the target that it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from dense_reward.records import IdArray
from dense_reward_trainer.configs.dpr import GradientConfig
from dense_reward_trainer.credit.alignment import alignment
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.jobs.gradient import descent_directions, likelihood_gradient
from dense_reward_trainer.rl.advantages import action_advantages
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.rl.policy import policy_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.runs.timer import Timer
from tiny_policy import EngineRewards, ids_of, tiny_policy
from tiny_training import PROMPTS, batch_of, config_of, weights_of


def test_a_batch_in_which_every_action_is_paid_the_same_has_no_direction() -> None:
    options = {"candidates": 3, "returns": "immediate", "kl_coefficient": 0.0, "baseline": "none"}
    config = GradientConfig.model_validate(config_of(**options).model_dump() | {"batches": 3})
    with pytest.raises(JobError, match=r"batch 1 has norm 0, .* get the same reward"):
        list(
            descent_directions(
                config, tiny_policy(), PROMPTS, Demonstrated(dict.fromkeys(map(bytes, PROMPTS), -1), 1.0)
            )
        )


@pytest.mark.parametrize("options", [{}, {"candidates": 3, "returns": "immediate"}], ids=["plain", "candidates"])
def test_it_is_the_gradient_of_the_runs_own_step(options: dict[str, object]) -> None:
    policy, config = tiny_policy(), config_of(max_grad_norm=1e9, **options)
    batch = batch_of(policy, config)
    before = weights_of(policy)
    gradient = Learner.of(config, policy).gradient(batch)
    assert all(torch.equal(one, other) for one, other in zip(before, weights_of(policy), strict=True))
    Learner.of(config, policy).update(batch, action_advantages(batch, config, config.kl_coefficient))
    own = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, own, rtol=1e-5, atol=1e-6)


def test_batches_are_those_that_the_run_would_draw() -> None:
    policy, config = tiny_policy(), GradientConfig.model_validate(config_of().model_dump() | {"batches": 3})
    first, second, _ = descent_directions(config, policy, PROMPTS, EngineRewards())
    learner = Learner.of(config, policy)
    again = [-learner.gradient(learner.sample_batch(n, PROMPTS, EngineRewards(), Timer())) for n in (1, 2)]
    torch.testing.assert_close(first, again[0])
    torch.testing.assert_close(second, again[1])
    assert not torch.allclose(first, second)


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """Rewards that are `price` for the token that was demonstrated after a prompt, and 0 for any other."""

    wanted: dict[bytes, int]
    price: float

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        assert candidates is not None
        results = []
        for rollout, ids_TK in zip(rollouts, candidates, strict=True):
            wanted, none = self.wanted[rollout.prompt_P.tobytes()], np.zeros(len(rollout.response_T), dtype=np.float32)
            signals = [self.price * (ids == wanted).astype(np.float32) for ids in (rollout.response_T, ids_TK)]
            results.append(ResponseRewards(signals[0], none, None, signals[1], np.zeros_like(signals[1])))
        return results


@pytest.mark.parametrize("price", [1.0, -1.0])
def test_a_reward_for_what_was_demonstrated_points_there_and_its_opposite_away(price: float) -> None:
    policy = tiny_policy()
    wanted = {prompt_P.tobytes(): int(prompt_P[0]) + 1 for prompt_P in PROMPTS}
    options = {"candidates": 64, "returns": "immediate", "baseline": "none", "max_new_tokens": 1, "kl_coefficient": 0}
    config = GradientConfig.model_validate(config_of(prompts_per_step=3, **options).model_dump() | {"batches": 3})
    target = likelihood_gradient(policy, PROMPTS, [ids_of(wanted[prompt.tobytes()]) for prompt in PROMPTS], 24)
    found = alignment(descent_directions(config, policy, PROMPTS, Demonstrated(wanted, price)), target)
    assert found.cosine * price > 0.2


def test_the_likelihoods_gradient_is_autograds_whatever_the_microbatches() -> None:
    policy, responses = tiny_policy(), [ids_of(3, 4), ids_of(5), ids_of(6, 7, 8)]
    loss = policy_logprobs(policy, PROMPTS, responses).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.model.parameters()))])
    for tokens in (1, 10_000):
        torch.testing.assert_close(
            likelihood_gradient(policy, PROMPTS, responses, tokens), expected, rtol=1e-4, atol=1e-4
        )
