"""The hooks of slime and miles on samples like theirs, with rewards that are known; neither program is needed.

tests/frameworks runs them inside the programs' own code, with a service.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations import miles, samples, slime
from dense_reward_trainer.rl.records import ResponseRewards, Rollout


class Status(Enum):
    COMPLETED = "completed"


@dataclass
class Sample:
    tokens: list[int]
    response_length: int
    group_index: int | None
    rollout_id: int | None = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    status: Status = Status.COMPLETED
    teacher_log_probs: list[float] | None = None
    opd_reverse_kl: list[float] | None = None

    def get_reward_value(self, _: object) -> float:
        return 5.0


class Rewards:
    """The reward of a token is its id."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        ids = [rollout.response_T.astype(np.float32) for rollout in rollouts]
        return [ResponseRewards(ids_T, np.zeros_like(ids_T)) for ids_T in ids]


# In the order of these samples: reward-to-go minus that of the other answer, an answer that ended counting 0.
SAMPLES = [([1], [3, 4], 0), ([2], [1], 1), ([1], [5], 0), ([2], [6, 6, 6], 1)]
EXPECTED = [[2.0, 4.0], [-17.0], [-2.0], [17.0, 12.0, 6.0]]


@pytest.fixture(autouse=True)
def _known_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "rewards_of", lambda *_, **__: Rewards())
    monkeypatch.setattr(samples, "AutoTokenizer", Namespace(from_pretrained=lambda _: None))


def settings(**changed: object) -> Namespace:
    given: dict[str, object] = {
        "hf_checkpoint": "sft",
        "rollout_temperature": 1.0,
        "custom_advantage_function_path": slime.HOOK,
        "use_opd": False,
        "opd_type": "sglang",
        "opd_kl_coef": 1.0,
        "advantage_estimator": "grpo",
        "kl_coef": 0.0,
        "dense_reward": {"kl_coefficient": 0.0},
    }
    return Namespace(**given | changed)


def made(**changed: Any) -> list[Sample]:  # noqa: ANN401
    return [Sample([*prompt, *answer], len(answer), group, **changed) for prompt, answer, group in SAMPLES]


def test_slime_carries_the_advantages_and_takes_them_out_again() -> None:
    given = made()
    assert slime.fetch(settings(), given) == ([5.0] * 4, [5.0] * 4)
    assert [sample.teacher_log_probs for sample in given] == EXPECTED
    vectors = [torch.tensor(sample.teacher_log_probs) for sample in given]
    data: dict[str, Any] = {"teacher_log_probs": vectors, "kl": [torch.zeros(len(row)) for row in EXPECTED]}
    slime.advantages(settings(), data)
    assert [row.tolist() for row in data["advantages"]] == EXPECTED
    assert data["returns"] is data["advantages"]
    with pytest.raises(ValueError, match="for tokens of"):
        slime.advantages(settings(), data | {"kl": [torch.zeros(1)] * 4})
    with pytest.raises(ConfigError, match="no dense reward"):
        slime.advantages(settings(), {"kl": []})


def test_miles_carries_them_with_the_opposite_sign_and_trains_on_no_reward() -> None:
    given = made()
    assert miles.fetch(settings(use_opd=True), given) == ([5.0] * 4, [0.0] * 4)
    assert [[-value for value in sample.opd_reverse_kl or []] for sample in given] == EXPECTED
    with pytest.raises(ConfigError, match="--use-opd"):
        miles.fetch(settings(), given)


def test_the_kl_penalty_is_that_of_the_samples_at_temperature_1() -> None:
    given = made()
    for sample in given:
        sample.rollout_log_probs = [-1.0] * sample.response_length
    options = {"kl_coefficient": 0.5, "baseline": "none"}
    slime.fetch(settings(dense_reward=options), given)
    assert given[0].teacher_log_probs == [8.0, 4.5]
    with pytest.raises(ConfigError, match="rollout-temperature to 1"):
        slime.fetch(settings(dense_reward=options, rollout_temperature=0.7), given)
    given[3].rollout_log_probs = None
    with pytest.raises(ConfigError, match="rollout_log_probs"):
        slime.fetch(settings(dense_reward=options), given)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"loss_mask": [0]}, "loss_mask has zeros"),
        ({"group_index": None}, "no group_index"),
        ({"group_index": 0}, "different sizes"),
        ({"tokens": [9, 1]}, "several prompts"),
        ({"rollout_id": 1}, "several samples"),
    ],
)
def test_samples_whose_advantages_would_be_wrong_are_refused(changed: dict[str, Any], reason: str) -> None:
    given = made(rollout_id=None)
    for name, value in changed.items():
        setattr(given[1], name, value)
    if "rollout_id" in changed:
        given[0].rollout_id = 1
    with pytest.raises(ConfigError, match=reason):
        slime.fetch(settings(), given)


def test_options_that_do_not_exist_are_refused_with_their_place() -> None:
    with pytest.raises(ConfigError, match=r"dense_reward\.retrns: .*--custom-config-path"):
        slime.fetch(settings(dense_reward={"retrns": "min"}), made())
    with pytest.raises(ConfigError, match="candidates to 0"):
        slime.fetch(settings(dense_reward={"candidates": 2}), made())
