"""The DPR loop on a tiny policy, with rewards from the fake engine: each choice, the update, and taking up a run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.engine.base import EngineInfo
from dense_reward.engine.fake import EOS_ID, VOCABULARY
from dense_reward.engine.pair import QUANTITIES, How, PairEngine
from dense_reward.engine.torch_engine import TorchModel
from dense_reward_trainer.dpr import (
    Batch,
    Training,
    advantages,
    assemble,
    describe,
    returns,
    sampling_of,
    seed_of,
    train,
    update,
)
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.optimiser import learning_rate, make_optimiser
from dense_reward_trainer.policy import Policy, policy_logprobs
from dense_reward_trainer.policy_config import DprConfig
from dense_reward_trainer.returns import mask_of, pad
from dense_reward_trainer.rollout import Rollout, sample
from dense_reward_trainer.runlog import Run
from dense_reward_trainer.token_rewards import ResponseRewards, TokenRewards
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_policy import EngineRewards, PolicyRewards, ids_of, tiny_checkpoint, tiny_llama, tiny_policy

PROMPTS = [ids_of(5, 6, 7), ids_of(9), ids_of(1, 2, 3, 4, 5)]
SPENT = frozenset({"rollout_s", "score_s", "update_s", "tokens_per_s"})


def config_of(**changes: object) -> DprConfig:
    values: dict[str, object] = {
        "output_dir": "unused",
        "policy": "unused",
        "prompts": {"source": "arithmetic"},
        "steps": 6,
        "prompts_per_step": 2,
        "group_size": 3,
        "max_new_tokens": 5,
        "learning_rate": 1e-3,
        "microbatch_tokens": 24,
        "save_every": 2,
        "evaluate_every": 100,
        "device": "cpu",
    }
    return DprConfig.model_validate(values | changes)


def training_in(folder: Path, **changes: object) -> Training:
    """A fresh policy, not yet trained, in a run folder."""
    config, checkpoint = config_of(**changes), tiny_checkpoint()
    folder.mkdir(exist_ok=True)
    optimiser = make_optimiser(config, checkpoint.policy.model)
    return Training(config, checkpoint, optimiser, PROMPTS, (), Run(folder, "run", resumed=False))


def batch_of(policy: Policy, config: DprConfig, rewards: TokenRewards | None = None) -> Batch:
    rollouts = sample(policy, PROMPTS, sampling_of(config), seed=0)
    return assemble(policy, rollouts, (rewards or EngineRewards()).score(rollouts), config.microbatch_tokens)


def weights_of(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def said(_: str) -> None:
    """A report that nobody reads."""


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_update_follows_the_gradient_at_the_sampling_temperature(temperature: float) -> None:
    policy = tiny_policy(dtype=torch.float64)
    config = config_of(temperature=temperature, max_grad_norm=1e9)
    batch = batch_of(policy, config)
    advantage_BT = advantages(returns(batch, config), batch, config)
    loss, norm = update(policy, make_optimiser(config, policy.model), batch, advantage_BT, config)
    own = [parameter.grad.clone() for parameter in policy.model.parameters() if parameter.grad is not None]

    fresh = tiny_policy(dtype=torch.float64)
    objective = torch.zeros((), dtype=torch.float64)
    for rollout, advantage_T in zip(batch.rollouts, advantage_BT, strict=True):
        logits_LV = fresh.model(torch.tensor([[*rollout.prompt_P, *rollout.response_T]])).logits[0]
        for t, token in enumerate(rollout.response_T.tolist()):
            state_V = logits_LV[len(rollout.prompt_P) + t - 1] / temperature
            objective = objective + advantage_T[t] * torch.log_softmax(state_V, -1)[token]
    expected = torch.autograd.grad(-objective / len(batch.rollouts), list(fresh.model.parameters()))
    for own_gradient, expected_gradient in zip(own, expected, strict=True):
        torch.testing.assert_close(own_gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert loss == pytest.approx(-float(objective.detach()) / len(batch.rollouts), rel=1e-9)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-6)


def test_rewards_and_the_penalty_are_at_temperature_1_whatever_is_sampled_at() -> None:
    policy = tiny_policy()
    config = config_of(temperature=0.5, kl_coefficient=0.25, baseline="none")
    batch = batch_of(policy, config)
    prompts, responses = [r.prompt_P for r in batch.rollouts], [r.response_T for r in batch.rollouts]
    at_1_BT = policy_logprobs(policy, prompts, responses, temperature=1.0).detach()
    torch.testing.assert_close(batch.policy_logprob_BT, at_1_BT, rtol=0, atol=1e-4)
    paid_BT = batch.signal_BT - 0.25 * (at_1_BT - batch.sft_logprob_BT)
    expected_B = (paid_BT * batch.mask_BT).sum(1).double()
    torch.testing.assert_close(returns(batch, config)[:, 0], expected_B, rtol=0, atol=1e-3)


def test_before_the_first_step_the_kl_to_the_sft_model_is_0_also_where_its_output_rows_are_padded() -> None:
    """Half of the output rows are no ids of the tokenizer: what they get must be missing on both sides."""
    model, sft, reference = (tiny_llama(seed=seed, vocabulary=2 * VOCABULARY) for seed in (0, 0, 1))
    info = EngineInfo("sft", "reference", "r", "float32", "cpu", VOCABULARY, 128, QUANTITIES, related=True)
    service = PairEngine(TorchModel(sft), TorchModel(reference), info, How(1000))
    config = config_of()
    batch = batch_of(Policy(model, EOS_ID, VOCABULARY), config, EngineRewards(engine=service))
    assert describe(batch, returns(batch, config))["kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(batch.policy_logprob_BT, batch.sft_logprob_BT, rtol=0, atol=1e-4)


def test_one_optimiser_step_does_not_depend_on_the_size_of_microbatches() -> None:
    after = []
    for tokens in (1, 24, 10_000):
        policy, config = tiny_policy(dtype=torch.float64), config_of(microbatch_tokens=tokens)
        batch = batch_of(policy, config)
        update(policy, make_optimiser(config, policy.model), batch, returns(batch, config), config)
        after.append(torch.cat([weight.flatten() for weight in weights_of(policy)]))
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(after[0], after[2], rtol=0, atol=1e-8)


@dataclass(slots=True)
class Remembering:
    """Pays 1 for every id, and 100 for an end of turn; remembers what it was asked."""

    end_of_turn_id: int
    asked: list[Rollout]

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        self.asked.extend(rollouts)
        rows = [np.where(r.response_T == self.end_of_turn_id, 100.0, 1.0).astype(np.float32) for r in rollouts]
        return [ResponseRewards(row, np.zeros_like(row)) for row in rows]


def test_a_response_that_was_cut_off_gets_no_reward_for_an_end_of_turn() -> None:
    policy = tiny_policy()
    policy.model.lm_head.weight.data[policy.end_of_turn_id] *= 3.0
    config = config_of(group_size=16, kl_coefficient=0.0, baseline="none")
    rewards = Remembering(policy.end_of_turn_id, [])
    batch = batch_of(policy, config, rewards)
    return_BT = returns(batch, config)
    assert {rollout.finished for rollout in rewards.asked} == {True, False}
    for rollout, return_T in zip(batch.rollouts, return_BT, strict=True):
        length = len(rollout.response_T)
        assert return_T[0] == (99 + length if rollout.finished else length)
        assert return_T[length - 1] == (100 if rollout.finished else 1)
        assert not return_T[length:].any()
    asked = [rollout.response_T.tolist() for rollout in rewards.asked]
    assert asked == [rollout.response_T.tolist() for rollout in batch.rollouts]
    assert all(ids[-1] != policy.end_of_turn_id for ids in asked if len(ids) == 5 and ids.count(257) == 0)


def known_batch(kl: bool = True) -> Batch:
    rows = [np.array(row, dtype=np.float32) for row in ([1.0, 2.0], [4.0], [-3.0, 0.0, 6.0], [0.5])]
    rollouts = [Rollout(ids_of(1), ids_of(*range(len(row))), finished=True) for row in rows]
    zeros_BT = torch.zeros(4, 3)
    return Batch(
        rollouts, mask_of([len(row) for row in rows]), pad(rows), zeros_BT, zeros_BT, pad(rows) if kl else None
    )


def test_advantages_are_returns_less_the_baseline_that_was_chosen() -> None:
    batch = known_batch()
    by_name = {}
    for name in ("none", "batch", "leave_one_out", "kl"):
        config = config_of(baseline=name, group_size=2)
        by_name[name] = advantages(returns(batch, config), batch, config)
    assert by_name["none"].tolist() == [[3, 2, 0], [4, 0, 0], [3, 6, 6], [0.5, 0, 0]]
    assert by_name["batch"].tolist() == [[0.375, 0, 0], [1.375, 0, 0], [0.375, 4, 4.5], [-2.125, 0, 0]]
    assert by_name["leave_one_out"].tolist() == [[-1, 2, 0], [1, 0, 0], [2.5, 6, 6], [-2.5, 0, 0]]
    assert by_name["kl"].tolist() == [[2, 0, 0], [0, 0, 0], [6, 6, 0], [0, 0, 0]]


def test_the_kl_baseline_without_kl_from_the_service_is_refused() -> None:
    config, batch = config_of(baseline="kl"), known_batch(kl=False)
    with pytest.raises(ValueError, match="ask the service"):
        advantages(returns(batch, config), batch, config)


def test_clipping_is_of_the_signal_and_whitening_of_the_advantages() -> None:
    clipped = config_of(reward_clip=1.0, baseline="none", group_size=2)
    assert returns(known_batch(), clipped)[:, 0].tolist() == [2.0, 1.0, 0.0, 0.5]
    whitening = config_of(whiten=True, baseline="none", group_size=2)
    white_BT = advantages(returns(known_batch(), whitening), known_batch(), whitening)
    tokens_N = white_BT[known_batch().mask_BT > 0]
    assert float(tokens_N.mean()) == pytest.approx(0, abs=1e-9)
    assert float(tokens_N.std(correction=0)) == pytest.approx(1)


def test_a_step_is_described_by_means_over_tokens_and_responses() -> None:
    batch = replace(known_batch(), policy_logprob_BT=torch.full((4, 3), -2.0) * known_batch().mask_BT)
    described = describe(batch, returns(batch, config_of(kl_coefficient=0.0)))
    assert described["reward_sum"] == 10.5 / 4
    assert described["reward_mean"] == 10.5 / 7
    assert described["return_mean"] == 10.5 / 4
    assert described["kl_to_sft"] == -14 / 4
    assert described["entropy"] == 2.0
    assert (described["length_mean"], described["truncated"]) == (7 / 4, 0.0)


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
    before = weights_of(policy)
    with pytest.raises(JobError, match="training has diverged"):
        update(policy, make_optimiser(config, policy.model), batch, batch.mask_BT * math.inf, config)
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights_of(policy), before, strict=True))


@dataclass(frozen=True, slots=True)
class EvenIds:
    """Pays 1 for an even id and takes 1 for an odd one; the SFT model is the policy that training started from."""

    sft: Policy

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        rows = [(1 - 2 * (rollout.response_T % 2)).astype(np.float32) for rollout in rollouts]
        sft = PolicyRewards(self.sft).score(rollouts)
        return [ResponseRewards(row, s.sft_logprob_T, 0 * row) for row, s in zip(rows, sft, strict=True)]


@pytest.mark.parametrize("baseline", ["none", "batch", "leave_one_out", "kl"])
def test_training_raises_what_it_is_paid_for(tmp_path: Path, baseline: str) -> None:
    changes = {"steps": 25, "group_size": 8, "learning_rate": 1e-2, "baseline": baseline, "save_every": 100}
    training = training_in(tmp_path / "run", **changes)
    train(training, EvenIds(tiny_checkpoint().policy), said)
    lines = training.metrics.read()
    returned = [line["return_mean"] or 0.0 for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert lines[0]["kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    assert np.mean(returned[-5:]) > np.mean(returned[:5]) + 1.0


@pytest.mark.parametrize(("coefficient", "least", "most"), [(0.0, 3.0, math.inf), (20.0, -1.0, 1.0)])
def test_a_high_kl_coefficient_keeps_the_policy_at_the_sft_model(
    tmp_path: Path, coefficient: float, least: float, most: float
) -> None:
    changes = {"steps": 25, "group_size": 8, "learning_rate": 1e-2, "kl_coefficient": coefficient}
    training = training_in(tmp_path / "run", **changes)
    train(training, EvenIds(tiny_checkpoint().policy), said)
    assert least <= np.mean([line["kl_to_sft"] or 0.0 for line in training.metrics.read()[-5:]]) < most


class PowerCutError(Exception):
    """Something that stops a run."""


@dataclass(slots=True)
class Failing:
    """The fake engine's rewards, so many times."""

    answers_left: int

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        if self.answers_left == 0:
            raise PowerCutError
        self.answers_left -= 1
        return EngineRewards().score(rollouts)


@pytest.mark.parametrize("answers", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_weights_of_an_unbroken_one(tmp_path: Path, answers: int) -> None:
    changes = {"schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1}
    unbroken = training_in(tmp_path / "unbroken", **changes)
    train(unbroken, EngineRewards(), said)

    with pytest.raises(PowerCutError):
        train(training_in(tmp_path / "broken", **changes), Failing(answers), said)
    resumed = training_in(tmp_path / "broken", **changes)
    train(resumed, EngineRewards(), said)

    pairs = zip(weights_of(resumed.checkpoint.policy), weights_of(unbroken.checkpoint.policy), strict=True)
    assert all(torch.equal(weight, expected) for weight, expected in pairs)
    assert lasting(resumed.metrics.read()) == lasting(unbroken.metrics.read())
    assert (tmp_path / "broken" / "dpr.png").stat().st_size > 10_000


def lasting(lines: Sequence[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """Metrics without the time that they took."""
    return [{name: value for name, value in line.items() if name not in SPENT} for line in lines]


def test_the_newest_two_states_are_kept_and_a_half_written_one_is_no_state(tmp_path: Path) -> None:
    training = training_in(tmp_path / "run", steps=6, save_every=1)
    train(training, EngineRewards(), said)
    states = training.states
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-00000005.pt", "step-00000006.pt"]
    (states.folder / ".partial").write_bytes(b"half of a sta")
    assert states.restore(training.checkpoint.policy.model, training.optimiser) == 6


def test_a_run_without_a_state_starts_at_the_beginning_with_empty_metrics(tmp_path: Path) -> None:
    training = training_in(tmp_path / "run", steps=1)
    training.metrics.append(0, {"left": 1.0})
    train(training, EngineRewards(), said)
    assert [line["step"] for line in training.metrics.read()] == [1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"group_size": 1}, "group_size to at least 2"),
        ({"warmup_steps": 6}, "leaves nothing"),
        ({"gama": 1.0}, "Extra inputs"),
        ({"gamma": math.nan}, "gamma"),
        ({"kl_coefficient": math.inf}, "kl_coefficient"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config_of(**changes)


def test_every_choice_that_the_paper_leaves_open_is_described_as_such() -> None:
    left_open = {
        name for name, field in DprConfig.model_fields.items() if "paper leaves this open" in (field.description or "")
    }
    assert left_open >= {"baseline", "group_size", "learning_rate", "normalise", "reward_clip", "temperature", "whiten"}
    assert json.dumps(DprConfig.model_json_schema())
