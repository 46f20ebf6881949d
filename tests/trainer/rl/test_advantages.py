"""The options of DPR on a batch: advantages of hand-made batches, and expected gradients by enumeration."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.rl.advantages import Batch, Candidates, action_advantages, shaped_rewards, token_returns
from dense_reward_trainer.rl.batch_metrics import describe
from dense_reward_trainer.rl.losses import kl_loss, policy_gradient
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.returns import mask_of, pad
from enumerated_task import (
    END,
    HORIZON,
    LENGTHS,
    RESPONSES,
    STATE_INDEX,
    VOCABULARY,
    World,
    a_world,
    assert_same,
    exact,
    gathered,
    gradient,
)
from pydantic import ValidationError
from tiny_policy import ids_of
from torch import Tensor

COEFFICIENT = 0.3
STATES_BT = pad([np.array([STATE_INDEX[r[:t]] for t in range(len(r))]) for r in RESPONSES], torch.long)


def config_of(**changes: object) -> DprConfig:
    values = {"output_dir": "unused", "policy": "unused", "prompts": {"source": "arithmetic"}, "steps": 1}
    return DprConfig.model_validate(values | changes)


@pytest.fixture
def world() -> World:
    return a_world()


def batch_of(world: World, rows: Sequence[int], count: int) -> Batch:
    """A batch of the responses `rows`, with `count` candidates at every position."""
    policy_SV = world.policy_SV.detach()
    lengths = [LENGTHS[b] for b in rows]
    part = (list(rows), slice(max(lengths)))
    candidates = None
    if count:
        ids_BTK = policy_SV.topk(count).indices[STATES_BT[part]]
        policy, signal, sft = (
            table_SV[STATES_BT[part]].gather(2, ids_BTK) for table_SV in (policy_SV, world.reward_SV, world.sft_SV)
        )
        candidates = Candidates(ids_BTK, policy, signal, sft)
    return Batch(
        [Rollout(ids_of(1), np.array(RESPONSES[b], dtype=np.int32), finished=True) for b in rows],
        mask_of(lengths).double(),
        gathered(world.reward_SV)[part],
        gathered(policy_SV)[part],
        gathered(world.sft_SV)[part],
        world.kl_S[STATES_BT[part]],
        candidates,
    )


def each_objective(world: World, size: int, config: DprConfig) -> list[tuple[float, Tensor]]:
    """The probability of every group of responses, and the objective whose gradient is the group's estimate."""
    found = []
    for group in product(range(len(RESPONSES)), repeat=size):
        batch = batch_of(world, group, config.candidates)
        weighed = action_advantages(batch, config, config.kl_coefficient)
        states_BT = STATES_BT[list(group), : weighed.ids_BTM.shape[1]]
        logprob_BTM = world.policy_SV[states_BT].gather(2, weighed.ids_BTM)
        loss = policy_gradient(logprob_BTM, logprob_BTM, weighed.advantage_BTM, weighed.weight_BTM, over=size)
        if config.kl_penalty != "reward":
            own_BT = logprob_BTM[..., 0]
            penalty = kl_loss(config.kl_penalty, own_BT, own_BT, batch.sft_logprob_BT, batch.mask_BT, over=size)
            loss = loss + config.kl_coefficient * penalty
        probability = float(world.probability_B().detach()[list(group)].prod())
        found.append((probability, -loss))
    return found


def expected(world: World, size: int = 1, **options: object) -> Tensor:
    config = config_of(**{"kl_coefficient": 0.0, "baseline": "none", "group_size": max(size, 2), **options})
    config = config.model_copy(update={"group_size": size})
    weighted = [probability * objective for probability, objective in each_objective(world, size, config)]
    return gradient(torch.stack(weighted).sum(), world)


def visits(world: World) -> Tensor:
    """The probability that the policy visits each state, [S]."""
    visited_S = torch.zeros(len(STATE_INDEX), dtype=torch.float64)
    for response, probability in zip(RESPONSES, world.probability_B().detach(), strict=True):
        for t in range(len(response)):
            visited_S[STATE_INDEX[response[:t]]] += probability
    return visited_S


@pytest.mark.parametrize(("size", "options"), [(1, {}), (2, {"baseline": "leave_one_out"})])
def test_the_total_follows_the_sum_of_rewards_too(world: World, size: int, options: dict[str, object]) -> None:
    found_SV = expected(world, size, returns="total", kl_coefficient=COEFFICIENT, **options)
    assert_same(found_SV, exact(world, world.reward_SV, COEFFICIENT))


def test_immediate_rewards_follow_each_state_by_itself(world: World) -> None:
    now = (visits(world)[:, None] * world.policy_SV.exp() * world.reward_SV).sum()
    found_SV = expected(world, returns="immediate")
    assert_same(found_SV, gradient(now, world))
    assert (found_SV - exact(world, world.reward_SV)).abs().max() > 1e-2


@pytest.mark.parametrize("signal", ["reward", "sft_logprob"])
def test_immediate_credit_rests_where_its_description_says(world: World, signal: str) -> None:
    """At pi_sft (pi_sft / pi_ref)^(1/b); paid sft_logprob, as if the reference gave all ids log-prob 0."""
    reference_SV = world.reference_SV if signal == "reward" else torch.zeros_like(world.sft_SV)
    for coefficient in (0.5, 1.0):
        logits_SV = world.sft_SV + (world.sft_SV - reference_SV) / coefficient
        if signal == "sft_logprob":
            torch.testing.assert_close(logits_SV, world.sft_SV / (coefficient / (1 + coefficient)))
        rest = World(world.sft_SV, reference_SV, logits_SV.requires_grad_())
        assert expected(rest, returns="immediate", kl_coefficient=coefficient).abs().max() < 1e-12
        assert expected(rest, returns="immediate", kl_coefficient=2 * coefficient).abs().max() > 1e-2


def least_from(world: World, state: tuple[int, ...], so_far: float) -> float:
    """The expected least signal of a response from `state` on, if the least one before it is `so_far`."""
    if len(state) == HORIZON or (state and state[-1] == END):
        return so_far
    row = STATE_INDEX[state]
    probability_V, reward_V = world.policy_SV.detach()[row].exp().tolist(), world.reward_SV[row].tolist()
    each = (least_from(world, (*state, a), min(so_far, reward_V[a])) for a in range(VOCABULARY))
    return float(np.dot(probability_V, list(each)))


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, {}), (2, {"baseline": "leave_one_out"}), (1, {"baseline": "kl"}), (1, {"kl_coefficient": COEFFICIENT})],
    ids=["none", "leave_one_out", "kl baseline", "kl penalty"],
)
def test_the_minimum_follows_in_each_state_the_least_signal_from_there_on(
    world: World, size: int, options: dict[str, object]
) -> None:
    """And the KL penalty its own objective: that of whole responses."""
    least_SV = torch.tensor(
        [
            [least_from(world, (*state, a), float(world.reward_SV[row, a])) for a in range(VOCABULARY)]
            for state, row in STATE_INDEX.items()
        ],
        dtype=torch.float64,
    )
    each_SV = gradient((visits(world)[:, None] * world.policy_SV.exp() * least_SV).sum(), world)
    coefficient = COEFFICIENT if "kl_coefficient" in options else 0.0
    penalty_SV = exact(world, world.reward_SV, coefficient) - exact(world, world.reward_SV)
    found_SV = expected(world, size, returns="min", **options)
    assert_same(found_SV, each_SV + penalty_SV)
    least_B = torch.stack([row[: LENGTHS[b]].min() for b, row in enumerate(gathered(world.reward_SV))])
    whole_SV = gradient((world.probability_B() * least_B).sum(), world)
    assert (each_SV - whole_SV).abs().max() > 1e-2, "it is not the gradient of the least signal of whole responses"


@pytest.mark.parametrize(
    ("count", "size", "baseline"),
    [(1, 1, "none"), (2, 1, "none"), (3, 1, "none"), (2, 2, "batch"), (2, 2, "leave_one_out")],
)
def test_candidates_leave_the_objective_as_it_is(world: World, count: int, size: int, baseline: str) -> None:
    found_SV = expected(world, size, candidates=count, baseline=baseline, kl_coefficient=COEFFICIENT)
    sampled_SV = expected(world, size, baseline=baseline, kl_coefficient=COEFFICIENT)
    # The batch mean scales sampled terms by 1 - 1/B, but not terms that are summed over candidates.
    if baseline != "batch":
        assert_same(sampled_SV, exact(world, world.reward_SV, COEFFICIENT))
        assert_same(found_SV, sampled_SV)
    assert torch.cosine_similarity(found_SV.flatten(), sampled_SV.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("count", [1, 2, 3])
def test_candidates_cover_immediate_credit(world: World, count: int) -> None:
    assert_same(expected(world, candidates=count, returns="immediate"), expected(world, returns="immediate"))


def noise_of(world: World, **options: object) -> float:
    """Variance of the gradient estimate, summed over the logits."""
    objectives = each_objective(world, 1, config_of(returns="immediate", baseline="none", **options))
    estimates = [(probability, gradient(objective, world)) for probability, objective in objectives]
    mean_SV = torch.stack([probability * one_SV for probability, one_SV in estimates]).sum(0)
    return sum(probability * float((one_SV - mean_SV).square().sum()) for probability, one_SV in estimates)


def test_all_actions_as_candidates_leave_the_noise_of_the_states_that_are_visited(world: World) -> None:
    assert noise_of(world, candidates=3) < 0.5 * noise_of(world)


@pytest.mark.parametrize("name", ["loss_k2", "loss_k3"])
def test_a_kl_in_the_loss_is_that_of_each_state_in_its_own_direction(world: World, name: str) -> None:
    policy_SV, sft_SV = world.policy_SV, world.sft_SV
    kl_S = {
        "loss_k2": (policy_SV.exp() * (policy_SV - sft_SV)).sum(1),
        "loss_k3": (sft_SV.exp() * (sft_SV - policy_SV)).sum(1),
    }[name]
    pulled_SV = expected(world, kl_penalty=name, kl_coefficient=1.0) - expected(world)
    assert_same(pulled_SV, gradient(-(visits(world) * kl_S).sum(), world))
    whole_SV = exact(world, world.reward_SV, 1.0) - exact(world, world.reward_SV)
    assert (pulled_SV - whole_SV).abs().max() > 1e-2


def test_k1_as_a_loss_would_do_nothing_and_is_refused(world: World) -> None:
    loss = (world.probability_B().detach() * (gathered(world.policy_SV - world.sft_SV)).sum(1)).sum()
    assert gradient(loss, world).abs().max() < 1e-12
    with pytest.raises(ValidationError, match="would do nothing"):
        config_of(kl_penalty="loss_k1")


def known_batch(kl: bool = True) -> Batch:
    rows = [np.array(row, dtype=np.float32) for row in ([1.0, 2.0], [4.0], [-3.0, 0.0, 6.0], [0.5])]
    rollouts = [Rollout(ids_of(1), ids_of(*range(len(row))), finished=True) for row in rows]
    zeros_BT = torch.zeros(4, 3)
    return Batch(
        rollouts, mask_of([len(row) for row in rows]), pad(rows), zeros_BT, zeros_BT, pad(rows) if kl else None
    )


def advantages(batch: Batch, **options: object) -> Tensor:
    return action_advantages(batch, config_of(group_size=2, **options), 0.0).advantage_BTM[..., 0]


def test_advantages_are_returns_less_the_baseline_that_was_chosen() -> None:
    by_name = {n: advantages(known_batch(), baseline=n) for n in ("none", "batch", "leave_one_out", "kl")}
    assert by_name["none"].tolist() == [[3, 2, 0], [4, 0, 0], [3, 6, 6], [0.5, 0, 0]]
    assert by_name["batch"].tolist() == [[0.375, 0, 0], [1.375, 0, 0], [0.375, 4, 4.5], [-2.125, 0, 0]]
    assert by_name["leave_one_out"].tolist() == [[-1, 2, 0], [1, 0, 0], [2.5, 6, 6], [-2.5, 0, 0]]
    assert by_name["kl"].tolist() == [[2, 0, 0], [0, 0, 0], [6, 6, 0], [0, 0, 0]]


def test_the_minimum_is_that_of_the_clipped_signal_and_the_penalty_is_summed() -> None:
    batch = known_batch()
    batch = replace(batch, policy_logprob_BT=batch.mask_BT * torch.tensor([[1.0, 10.0, 100.0]]))
    found_BT = token_returns(batch, config_of(returns="min", reward_clip=3.0), 1.0)
    assert found_BT.tolist() == [[1 - 11, 2 - 10, 0], [3 - 1, 0, 0], [-3 - 111, 0 - 110, 3 - 100], [0.5 - 1, 0, 0]]


def test_a_total_is_compared_with_the_totals_of_the_others_at_every_position() -> None:
    found_BT = advantages(known_batch(), returns="total", baseline="leave_one_out")
    assert found_BT.tolist() == [[-1, -1, 0], [1, 0, 0], [2.5, 2.5, 2.5], [-2.5, 0, 0]]


def test_the_kl_baseline_without_kl_from_the_service_is_refused() -> None:
    with pytest.raises(ValueError, match="request kl from the service"):
        advantages(known_batch(kl=False), baseline="kl")


def test_clipping_is_of_the_signal_and_whitening_of_the_advantages() -> None:
    clipped = config_of(reward_clip=1.0, baseline="none", group_size=2)
    assert token_returns(known_batch(), clipped, 0.0)[:, 0].tolist() == [2.0, 1.0, 0.0, 0.5]
    tokens_N = advantages(known_batch(), whiten=True, baseline="none")[known_batch().mask_BT > 0]
    assert float(tokens_N.mean()) == pytest.approx(0, abs=1e-9)
    assert float(tokens_N.std(correction=0)) == pytest.approx(1)


def test_a_step_is_described_by_means_over_tokens_and_responses() -> None:
    batch = replace(known_batch(), policy_logprob_BT=torch.full((4, 3), -2.0) * known_batch().mask_BT)
    described = describe(batch, shaped_rewards(batch, config_of(returns="immediate"), 0.5))
    assert described["reward_sum"] == 10.5 / 4
    assert described["reward_mean"] == 10.5 / 7
    assert described["paid_sum"] == pytest.approx(10.5 / 4 - 0.5 * described["kl_to_sft"])
    assert described["kl_to_sft"] == -14 / 4
    assert described["entropy"] == 2.0
    assert (described["length_mean"], described["truncated"]) == (7 / 4, 0.0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"candidates": 2, "whiten": True}, "candidates need whiten false"),
        ({"candidates": 2, "temperature": 0.7}, "candidates need temperature 1"),
        ({"candidates": 2, "returns": "total"}, "candidates need returns reward_to_go or immediate"),
        ({"candidates": 2, "baseline": "kl"}, "candidates need another baseline than kl"),
        ({"candidates": 2, "returns": "min"}, "a minimum is no sum"),
        ({"gamma": 0.9, "returns": "total"}, "gamma only discounts"),
        ({"gamma": 0.9, "returns": "min"}, "gamma only discounts"),
        ({"kl_target": 1.0, "temperature": 0.7}, "kl_target to null"),
        ({"kl_penalty": "loss_k2", "temperature": 0.7}, "set temperature to 1"),
        ({"kl_target": 1.0, "kl_coefficient": 0.0}, "set kl_coefficient above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config_of(**changes)
