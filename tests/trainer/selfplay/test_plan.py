"""The plan of the rounds: whose prompts, how many pairs, how many steps."""

import pytest
from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.selfplay.plan import checkpoint_name, round_plans


def config_of(**changes: object) -> IrftConfig:
    values: dict[str, object] = {"output_dir": "unused", "policy": "unused", "data": {"source": "arithmetic"}}
    return IrftConfig.model_validate(values | {"rounds": 3, "batch_size": 4} | changes)


def test_shares_cover_all_demonstrations_once() -> None:
    plans = round_plans(config_of(), 10)
    assert [len(plan.places) for plan in plans] == [4, 3, 3]
    assert sorted(place for plan in plans for place in plan.places) == list(range(10))
    assert [plan.number for plan in plans] == [1, 2, 3]


def test_the_seed_decides_the_shares() -> None:
    first, again, other = (round_plans(config_of(seed=seed), 40)[0].places for seed in (0, 0, 1))
    assert first == again != other


def test_spin_answers_all_prompts_and_keeps_the_pairs_of_the_round_before() -> None:
    plans = round_plans(config_of(prompts="all", previous_rounds=1), 10)
    assert [plan.places for plan in plans] == [tuple(range(10))] * 3
    assert [plan.pairs for plan in plans] == [10, 20, 20]
    assert [(plan.first_step, plan.last_step) for plan in plans] == [(0, 3), (3, 8), (8, 13)]


def test_previous_pairs_of_shares_are_those_of_the_share_before() -> None:
    assert [plan.pairs for plan in round_plans(config_of(previous_rounds=1), 10)] == [4, 7, 6]


@pytest.mark.parametrize(
    ("changes", "steps", "samples"),
    [
        ({"epochs": 2}, 6, 20),  # 4 + 4 + 2, twice
        ({"gradient_accumulation": 2}, 2, 10),
        ({"steps": 4}, 4, 14),  # an epoch of 10, and a batch
        ({"steps": 2}, 2, 8),
    ],
)
def test_steps_and_samples_of_a_round(changes: dict[str, object], steps: int, samples: int) -> None:
    (plan,) = round_plans(config_of(rounds=1, **changes), 10)
    assert (plan.steps, plan.samples) == (steps, samples)
    assert (plan.last_step, plan.last_sample) == (steps, samples)


def test_more_rounds_than_demonstrations_cannot_share_them() -> None:
    with pytest.raises(ConfigError, match="2 demonstrations cannot be shared by 3 rounds"):
        round_plans(config_of(), 2)


def test_the_model_after_the_last_round_is_the_sft_of_the_pairs() -> None:
    assert [checkpoint_name(number, 2) for number in range(3)] == ["round_0", "round_1", "sft"]
