"""What each round does, known before the first: its prompts, its pairs, its steps. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.errors import ConfigError

START, FINAL = "round_0", "sft"
"""Folders of the model before the first round, and after the last: that is the SFT model of the served pairs."""


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Round `number` of 1 to T.

    `places`: the rows of the data whose prompts it answers. `pairs`: pairs that it trains on, those of the round before
    included. `samples`: pairs that its steps process, repeats counted. `first_step`, `first_sample`: steps and samples
    of all rounds before.
    """

    number: int
    places: tuple[int, ...]
    pairs: int
    steps: int
    samples: int
    first_step: int
    first_sample: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps

    @property
    def last_sample(self) -> int:
        return self.first_sample + self.samples


def round_plans(config: IrftConfig, rows: int) -> list[RoundPlan]:
    """The rounds of a run on this many demonstrations. Raises ConfigError if a round would have no prompt."""
    places = _places(config, rows)
    plans: list[RoundPlan] = []
    step = sample = 0
    for number, own in enumerate(places, start=1):
        before = len(places[number - 2]) if config.previous_rounds and number > 1 else 0
        pairs = len(own) + before
        steps, samples = _extent(config, pairs)
        plans.append(RoundPlan(number, tuple(own), pairs, steps, samples, step, sample))
        step, sample = step + steps, sample + samples
    return plans


def checkpoint_name(number: int, rounds: int) -> str:
    """The folder of the model after round `number`; 0: before the first."""
    return FINAL if number == rounds else f"round_{number}"


def _places(config: IrftConfig, rows: int) -> list[Sequence[int]]:
    if config.prompts == "all":
        return [range(rows)] * config.rounds
    if rows < config.rounds:
        raise ConfigError(
            f"{rows} demonstrations cannot be shared by {config.rounds} rounds: lower rounds, or set prompts=all"
        )
    order = np.random.default_rng(config.seed).permutation(rows)
    return [[int(place) for place in part] for part in np.array_split(order, config.rounds)]


def _extent(config: IrftConfig, pairs: int) -> tuple[int, int]:
    """Steps of a round, and pairs that they process; the last step of an epoch processes the rest of its pairs."""
    per_step = config.batch_size * config.gradient_accumulation
    per_epoch = -(-pairs // per_step)
    steps = config.steps or config.epochs * per_epoch
    epochs, rest = divmod(steps, per_epoch)
    return steps, epochs * pairs + min(rest * per_step, pairs)
