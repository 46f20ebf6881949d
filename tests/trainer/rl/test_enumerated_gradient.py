"""The expected gradient of each estimator, by enumeration, against the gradient of its objective."""

from itertools import product

import numpy as np
import pytest
import torch
from dense_reward_trainer.configs.advantages import BaselineName
from dense_reward_trainer.rl.losses import policy_gradient
from dense_reward_trainer.rl.returns import baseline, mask_of, minus_kl_penalty, pad, reward_to_go
from enumerated_task import (
    HORIZON,
    LENGTHS,
    RESPONSES,
    STATE_INDEX,
    STATES,
    VOCABULARY,
    World,
    a_world,
    along,
    assert_same,
    exact,
    gathered,
    gradient,
)
from torch import Tensor

COEFFICIENT = 0.3


@pytest.fixture
def world() -> World:
    return a_world()


def estimated(world: World, name: BaselineName, reward_SV: Tensor, size: int = 1, coefficient: float = 0.0) -> Tensor:
    """Expected gradient of the estimator: its sum over every group of `size` responses, weighted by probability."""
    logprob_BT, sft_BT, kl_BT = gathered(world.policy_SV), gathered(world.sft_SV), along(world.kl_S)
    mask_BT = mask_of(LENGTHS).double()
    return_BT = reward_to_go(minus_kl_penalty(gathered(reward_SV), logprob_BT, sft_BT, coefficient), mask_BT)
    probability_B = world.probability_B().detach()
    losses = []
    for group in product(range(len(RESPONSES)), repeat=size):
        rows = list(group)
        advantage_GT = return_BT[rows] - baseline(name, return_BT[rows], size, kl_BT[rows])
        loss = policy_gradient(logprob_BT[rows], logprob_BT[rows], advantage_GT, mask_BT[rows], over=size)
        losses.append(probability_B[rows].prod() * loss)
    return -gradient(torch.stack(losses).sum(), world)


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
        advantage_GT = return_BT[rows] - mean_T
        loss = policy_gradient(logprob_BT[rows], logprob_BT[rows], advantage_GT, mask_BT[rows], over=2)
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
