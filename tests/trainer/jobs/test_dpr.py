"""The DPR loop on a tiny policy, with rewards from the fake engine: it learns what is rewarded, and resumes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.records import IdArray
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.jobs import dpr
from dense_reward_trainer.jobs.dpr import Training, metrics_of, train_policy
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.rl.policy import Policy
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.runs.run_folder import Run
from pydantic import ValidationError
from tiny_policy import EngineRewards, PolicyRewards, tiny_checkpoint
from tiny_training import PROMPTS, config_of, weights_of

pytestmark = pytest.mark.slow

DURATIONS = frozenset({"rollout_s", "logprob_s", "score_s", "update_s", "tokens_per_s"})


@pytest.fixture(autouse=True)
def _plotless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than these trainings; runs with real plots are in test_dpr_run.py."""
    monkeypatch.setattr(dpr, "plot_run", lambda lines, path: None)


def training_in(folder: Path, **changes: object) -> Training:
    """A fresh policy, not yet trained, in a run folder."""
    config, checkpoint = config_of(**changes), tiny_checkpoint()
    folder.mkdir(exist_ok=True)
    run, learner = Run(folder, "run", resumed=False), Learner.of(config, checkpoint.policy)
    return Training(config, checkpoint, learner, PROMPTS, (), run, metrics_of(config, run))


def ignore(_: str) -> None:
    """A report that is not checked."""


@dataclass(frozen=True, slots=True)
class EvenIds:
    """Reward 1 for an even id, -1 for an odd one; the SFT model is the initial policy."""

    sft: Policy

    def score(self, rollouts: Sequence[Rollout], _: object = None) -> list[ResponseRewards]:
        rows = [(1 - 2 * (rollout.response_T % 2)).astype(np.float32) for rollout in rollouts]
        sft = PolicyRewards(self.sft).score(rollouts)
        return [ResponseRewards(row, s.sft_logprob_T, 0 * row) for row, s in zip(rows, sft, strict=True)]


@pytest.mark.parametrize("baseline", ["none", "batch", "leave_one_out"])
def test_training_raises_what_it_is_paid_for(tmp_path: Path, baseline: str) -> None:
    changes = {"steps": 15, "group_size": 8, "learning_rate": 2e-2, "baseline": baseline, "save_every": 100}
    training = training_in(tmp_path / "run", **changes)
    train_policy(training, EvenIds(tiny_checkpoint().policy), ignore)
    lines = training.metrics.read()
    shaped = [line["paid_sum"] or 0.0 for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert lines[0]["kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    assert np.mean(shaped[-5:]) > np.mean(shaped[:5]) + 1.0


@pytest.mark.parametrize(("coefficient", "least", "most"), [(0.0, 3.0, math.inf), (20.0, -1.0, 1.0)])
def test_a_high_kl_coefficient_keeps_the_policy_at_the_sft_model(
    tmp_path: Path, coefficient: float, least: float, most: float
) -> None:
    changes = {"steps": 18, "group_size": 8, "learning_rate": 1e-2, "kl_coefficient": coefficient}
    training = training_in(tmp_path / "run", **changes)
    train_policy(training, EvenIds(tiny_checkpoint().policy), ignore)
    assert least <= np.mean([line["kl_to_sft"] or 0.0 for line in training.metrics.read()[-5:]]) < most


class PowerCutError(Exception):
    """Stops a run."""


@dataclass(slots=True)
class Failing:
    """The fake engine's rewards, for a number of calls."""

    answers_left: int

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        if self.answers_left == 0:
            raise PowerCutError
        self.answers_left -= 1
        return EngineRewards().score(rollouts, candidates)


MANY = {"kl_target": 0.1, "average_decay": 0.5, "updates_per_batch": 2, "candidates": 2}


@pytest.mark.parametrize(
    ("options", "answers"), [({}, 1), ({}, 3), (MANY, 3)], ids=["no state yet", "plain", "all state"]
)
def test_a_run_that_was_stopped_goes_on_to_the_weights_of_an_unbroken_one(
    tmp_path: Path, options: dict[str, object], answers: int
) -> None:
    changes = {"steps": 4, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1, **options}
    unbroken = training_in(tmp_path / "unbroken", **changes)
    train_policy(unbroken, EngineRewards(), ignore)

    with pytest.raises(PowerCutError):
        train_policy(training_in(tmp_path / "broken", **changes), Failing(answers), ignore)
    resumed = training_in(tmp_path / "broken", **changes)
    train_policy(resumed, EngineRewards(), ignore)

    pairs = zip(weights_of(resumed.learner.result), weights_of(unbroken.learner.result), strict=True)
    assert all(torch.equal(weight, expected) for weight, expected in pairs)
    assert without_durations(resumed.metrics.read()) == without_durations(unbroken.metrics.read())


def without_durations(lines: Sequence[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """Metrics without durations."""
    return [{name: value for name, value in line.items() if name not in DURATIONS} for line in lines]


def test_the_newest_two_states_are_kept_and_a_half_written_one_is_no_state(tmp_path: Path) -> None:
    training = training_in(tmp_path / "run", steps=6, save_every=1)
    train_policy(training, EngineRewards(), ignore)
    states = training.states
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-00000005.pt", "step-00000006.pt"]
    (states.folder / ".partial").write_bytes(b"half of a sta")
    newest = states.newest()
    assert newest is not None
    assert newest[0] == 6


def test_a_run_without_a_state_starts_at_the_beginning_with_empty_metrics(tmp_path: Path) -> None:
    training = training_in(tmp_path / "run", steps=1)
    training.metrics.append(0, {"left": 1.0})
    train_policy(training, EngineRewards(), ignore)
    assert [line["step"] for line in training.metrics.read()] == [1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"group_size": 1}, "group_size to at least 2"),
        ({"warmup_steps": 6}, "must be below steps, which is 6"),
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
