"""The policy gradient, enumerated: every response over three tokens of at most three steps, in float64.

The policy is a table of logits, one row per state, so every expectation is a finite sum. Expected gradients of the
estimators that training uses are compared with the gradient of the objective that they claim to follow.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from dense_reward_trainer.losses import reinforce
from dense_reward_trainer.policy_config import BaselineName
from dense_reward_trainer.returns import baseline, mask_of, pad, penalised, reward_to_go
from torch import Tensor

VOCABULARY, HORIZON, END = 3, 3, 0
COEFFICIENT = 0.3
Response = tuple[int, ...]


def every_response() -> list[Response]:
    """Those that end with END, and those that are cut off at the horizon."""
    bodies = [body for length in range(HORIZON) for body in product(range(1, VOCABULARY), repeat=length)]
    return [*((*body, END) for body in bodies), *product(range(1, VOCABULARY), repeat=HORIZON)]


RESPONSES = every_response()
STATES = sorted({response[:t] for response in RESPONSES for t in range(len(response))})
STATE_INDEX = {state: index for index, state in enumerate(STATES)}
LENGTHS = [len(response) for response in RESPONSES]


def gathered(table_SV: Tensor) -> Tensor:
    """A value per state and action, along every response, [B, T]."""
    rows = [torch.stack([table_SV[STATE_INDEX[r[:t]], r[t]] for t in range(len(r))]) for r in RESPONSES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def along(value_S: Tensor) -> Tensor:
    """A value per state, along every response, [B, T]."""
    return gathered(value_S[:, None].expand(-1, VOCABULARY))


def random_logprobs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(1.5 * torch.randn(len(STATES), VOCABULARY, generator=generator, dtype=torch.float64), -1)


@dataclass(frozen=True, slots=True)
class World:
    """SFT, reference and policy tables; the policy's logits are what gradients are taken of."""

    sft_SV: Tensor
    reference_SV: Tensor
    logits_SV: Tensor

    @property
    def policy_SV(self) -> Tensor:
        return torch.log_softmax(self.logits_SV, -1)

    @property
    def reward_SV(self) -> Tensor:
        return self.sft_SV - self.reference_SV

    @property
    def kl_S(self) -> Tensor:
        """KL(pi_sft || pi_ref) at every state."""
        return (self.sft_SV.exp() * self.reward_SV).sum(-1)

    def probability_B(self) -> Tensor:
        """Of every response under the policy; differentiable."""
        return gathered(self.policy_SV).sum(-1).exp()


@pytest.fixture
def world() -> World:
    return World(random_logprobs(1), random_logprobs(2), random_logprobs(3).requires_grad_())


def gradient(objective: Tensor, world: World) -> Tensor:
    return torch.autograd.grad(objective, world.logits_SV)[0]


def exact(world: World, reward_SV: Tensor, coefficient: float = 0.0) -> Tensor:
    """Gradient of E[sum r] - b KL(pi || pi_sft), by autograd through the exact expectation."""
    kl_B = gathered(world.policy_SV - world.sft_SV).sum(-1)
    return gradient((world.probability_B() * (gathered(reward_SV).sum(-1) - coefficient * kl_B)).sum(), world)


def estimated(world: World, name: BaselineName, reward_SV: Tensor, size: int = 1, coefficient: float = 0.0) -> Tensor:
    """Expected gradient of the estimator: over every group of `size` responses, weighted by its probability."""
    logprob_BT, sft_BT, kl_BT = gathered(world.policy_SV), gathered(world.sft_SV), along(world.kl_S)
    mask_BT = mask_of(LENGTHS).double()
    return_BT = reward_to_go(penalised(gathered(reward_SV), logprob_BT, sft_BT, coefficient), mask_BT)
    probability_B = world.probability_B().detach()
    losses = []
    for group in product(range(len(RESPONSES)), repeat=size):
        rows = list(group)
        advantage_GT = return_BT[rows] - baseline(name, return_BT[rows], size, kl_BT[rows])
        loss = reinforce(logprob_BT[rows], advantage_GT, mask_BT[rows], over=size)
        losses.append(probability_B[rows].prod() * loss)
    return -gradient(torch.stack(losses).sum(), world)


def assert_same(gradient_SV: Tensor, expected_SV: Tensor) -> None:
    assert expected_SV.abs().max() > 1e-3
    torch.testing.assert_close(gradient_SV, expected_SV, rtol=0, atol=1e-12)


def test_the_responses_are_all_there_are(world: World) -> None:
    assert float(world.probability_B().detach().sum()) == pytest.approx(1.0, abs=1e-12)


def test_reward_to_go_follows_the_expected_sum_of_rewards(world: World) -> None:
    assert_same(estimated(world, "none", world.reward_SV), exact(world, world.reward_SV))


def test_the_kl_baseline_leaves_the_objective_unchanged(world: World) -> None:
    assert_same(estimated(world, "kl", world.reward_SV), exact(world, world.reward_SV))


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_leaves_the_objective_unchanged(world: World, size: int) -> None:
    assert_same(estimated(world, "leave_one_out", world.reward_SV, size), exact(world, world.reward_SV))


@pytest.mark.parametrize("size", [2, 3])
def test_the_batch_mean_only_scales_the_gradient(world: World, size: int) -> None:
    assert_same(estimated(world, "batch", world.reward_SV, size), (1 - 1 / size) * exact(world, world.reward_SV))


def test_a_mean_over_unfinished_responses_alone_would_bend_the_gradient(world: World) -> None:
    mask_BT, logprob_BT = mask_of(LENGTHS).double(), gathered(world.policy_SV)
    return_BT = reward_to_go(gathered(world.reward_SV), mask_BT)
    probability_B = world.probability_B().detach()
    losses = []
    for first, second in product(range(len(RESPONSES)), repeat=2):
        rows = [first, second]
        mean_T = return_BT[rows].sum(0) / mask_BT[rows].sum(0).clamp_min(1)
        loss = reinforce(logprob_BT[rows], return_BT[rows] - mean_T, mask_BT[rows], over=2)
        losses.append(probability_B[first] * probability_B[second] * loss)
    bent_SV = -gradient(torch.stack(losses).sum(), world)
    assert cosine(bent_SV, exact(world, world.reward_SV)) < 0.99


@pytest.mark.parametrize(("name", "size"), [("none", 1), ("kl", 1), ("leave_one_out", 2)])
def test_k1_in_the_reward_follows_the_penalised_objective(world: World, name: BaselineName, size: int) -> None:
    expected_SV = exact(world, world.reward_SV, COEFFICIENT)
    assert_same(estimated(world, name, world.reward_SV, size, COEFFICIENT), expected_SV)
    assert not torch.allclose(expected_SV, exact(world, world.reward_SV), atol=1e-2)


def test_centred_rewards_are_another_objective_than_the_kl_baseline(world: World) -> None:
    centred_SV = world.reward_SV - world.kl_S[:, None]
    as_reward_SV = estimated(world, "none", centred_SV)
    assert_same(as_reward_SV, exact(world, centred_SV))
    as_baseline_SV = estimated(world, "kl", world.reward_SV)
    assert (as_reward_SV - as_baseline_SV).abs().max() > 0.1 * as_baseline_SV.abs().max()


def test_at_the_sft_policy_centred_rewards_are_worth_0_and_still_have_a_gradient(world: World) -> None:
    centred_SV = world.reward_SV - world.kl_S[:, None]
    at_sft = World(world.sft_SV, world.reference_SV, world.sft_SV.clone().requires_grad_())
    value = (at_sft.probability_B() * gathered(centred_SV).sum(-1)).sum()
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert exact(at_sft, centred_SV).abs().max() > 1e-3


def test_the_tilted_sft_distribution_over_responses_is_where_the_penalised_gradient_vanishes(world: World) -> None:
    optimum = World(world.sft_SV, world.reference_SV, tilted(world, COEFFICIENT).requires_grad_())
    estimated_SV = estimated(optimum, "none", world.reward_SV, 1, COEFFICIENT)
    assert estimated_SV.abs().max() < 1e-12
    per_token_SV = (world.sft_SV + world.reward_SV / COEFFICIENT).requires_grad_()
    elsewhere = World(world.sft_SV, world.reference_SV, per_token_SV)
    assert estimated(elsewhere, "none", world.reward_SV, 1, COEFFICIENT).abs().max() > 1e-2


def tilted(world: World, coefficient: float) -> Tensor:
    """Logits per state of pi*(y) proportional to pi_sft(y) (pi_sft(y)/pi_ref(y))^(1/b), by summing over completions."""
    weight_B = gathered(world.sft_SV + world.reward_SV / coefficient).sum(-1).exp()
    mass_SV = torch.zeros(len(STATES), VOCABULARY, dtype=torch.float64)
    for response, weight in zip(RESPONSES, weight_B, strict=True):
        for t in range(len(response)):
            mass_SV[STATE_INDEX[response[:t]], response[t]] += weight
    return mass_SV.log()


def cosine(first_SV: Tensor, second_SV: Tensor) -> float:
    return float(torch.cosine_similarity(first_SV.flatten(), second_SV.flatten(), dim=0))


def test_a_cut_off_response_gets_no_reward_for_an_end_that_it_does_not_have(world: World) -> None:
    cut_off = RESPONSES.index((1, 1, 1))
    rewards = [float(world.reward_SV[STATE_INDEX[(1,) * t], 1]) for t in range(HORIZON)]
    returns_BT = reward_to_go(pad([np.array(rewards)], torch.float64), mask_of([HORIZON]))
    assert float(gathered(world.reward_SV)[cut_off].sum()) == pytest.approx(float(returns_BT[0, 0]), abs=1e-12)
