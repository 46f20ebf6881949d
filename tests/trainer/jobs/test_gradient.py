"""The direction of DPR's gradient: cosines, the estimate of signal and noise, and that it is the run's gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from dense_reward.records import IdArray
from dense_reward_trainer.configs.dpr import GradientConfig
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.jobs.gradient import alignment, alignment_summary, descent_directions, likelihood_gradient
from dense_reward_trainer.rl.advantages import action_advantages
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.rl.policy import policy_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.runs.timer import Timer
from tiny_policy import EngineRewards, ids_of, tiny_policy
from tiny_training import PROMPTS, batch_of, config_of, weights_of
from torch.nn.functional import cosine_similarity


def test_noise_around_a_direction_hides_it_from_one_batch_and_not_from_the_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    target, across = torch.zeros(4000), torch.zeros(4000)
    target[0] = across[1] = 1.0
    expected = 0.6 * target + 0.8 * across
    noise = torch.randn(40, 4000, generator=generator) * 3 / 4000**0.5
    found = alignment((expected + one for one in noise), target)
    assert found.cosine == pytest.approx(0.6 / 10**0.5, abs=0.02)
    assert found.agreement == pytest.approx(0.1, abs=0.02)
    assert found.expected_cosine == pytest.approx(0.6, abs=0.06)
    directions = expected + noise
    cosines = cosine_similarity(directions, target[None], dim=1)
    assert found.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert found.cosine_standard_error == pytest.approx(float(cosines.std()) / 40**0.5, rel=1e-4)
    pairs = cosine_similarity(directions[:, None], directions[None], dim=2)
    assert found.agreement == pytest.approx(float((pairs.sum() - 40) / (40 * 39)), abs=1e-5)
    assert f"of the expected gradient: {found.expected_cosine:.2f} ± 0.01" in alignment_summary(found)


def test_the_error_of_the_estimate_is_its_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    target, expected = torch.zeros(500), torch.zeros(500)
    target[0], expected[0], expected[1] = 1.0, 0.6, 0.8
    found = [alignment(expected + torch.randn(20, 500, generator=generator) * 3 / 500**0.5, target) for _ in range(100)]
    estimates = torch.tensor([one.expected_cosine for one in found])
    errors = torch.tensor([one.expected_cosine_standard_error for one in found])
    assert float(estimates.mean()) == pytest.approx(0.6, abs=0.02)
    assert float(errors.mean()) == pytest.approx(float(estimates.std()), rel=0.3)


@pytest.mark.parametrize("dimension", [30, 1000])
def test_of_noise_next_to_nothing_is_claimed(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [alignment(torch.randn(12, dimension, generator=generator), torch.ones(dimension)) for _ in range(200)]
    claimed = [one for one in found if one.expected_cosine is not None]
    assert 0 < len(claimed) < 20
    spread = float(torch.tensor([one.agreement for one in found]).std())
    errors = torch.tensor([one.agreement_standard_error for one in found])
    assert float(errors.mean()) == pytest.approx(spread, rel=0.2)
    assert "raise batches" in alignment_summary(next(one for one in found if one.expected_cosine is None))
    with pytest.raises(ValueError, match="at least 3"):
        alignment([torch.ones(2)] * 2, torch.ones(2))


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
