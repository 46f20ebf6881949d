"""Sums from demonstrators of mixed quality, on top of a base model that learnt from another mixture.

An expert adds with the carry; a novice forgets it in the whole answer. Every sum carries from its units, so each answer
of a novice is wrong. Pure functions of the options and a seed. Must not import tokenizers or models.
"""

import random
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobOptions
from dense_reward_trainer.data.arithmetic import carrying_sums, worked_addition
from dense_reward_trainer.data.records import Demonstration
from dense_reward_trainer.tasks.records import TaskData, demonstration

Sums = Sequence[tuple[int, int]]


class MixedDemonstratorsTask(JobOptions):
    """Two-digit sums by experts and novices."""

    name: Literal["mixed_demonstrators"]
    base_novices: float = Field(default=0.9, ge=0.0, le=1.0, description="Share of novices in the base model's data.")
    sft_novices: float = Field(default=0.6, ge=0.0, le=1.0, description="Share of novices in the demonstrations.")
    base_demonstrations: int = Field(default=2000, ge=1, description="Answers that the base model learns from.")
    demonstrations: int = Field(default=1200, ge=1, description="Demonstrations of SFT, and prompts of DPR.")
    test: int = Field(default=400, ge=1, description="Test problems, answered by experts.")

    @model_validator(mode="after")
    def _enough_sums(self) -> Self:
        wanted, available = self.base_demonstrations + self.demonstrations + self.test, len(carrying_sums())
        if wanted > available:
            raise ValueError(
                f"{wanted} different sums are needed, but only {available} two-digit sums carry from their units: "
                "lower base_demonstrations, demonstrations or test"
            )
        return self

    def data(self, seed: int) -> TaskData:
        """Base, demonstrations and tests of a seed; no sum is in two of them."""
        rng = random.Random(seed)
        sums = carrying_sums()
        rng.shuffle(sums)
        first, second = self.base_demonstrations, self.base_demonstrations + self.demonstrations
        base = _answers(sums[:first], self.base_novices, rng)
        train = _answers(sums[first:second], self.sft_novices, rng)
        return TaskData(train, train, _answers(sums[second : second + self.test], 0.0, rng), base)


def _answers(sums: Sums, novices: float, rng: random.Random) -> tuple[Demonstration, ...]:
    """An answer to each sum; exactly the share `novices` of them, to the nearest answer, forgets the carry."""
    forgetful = set(rng.sample(range(len(sums)), round(novices * len(sums))))
    return tuple(
        demonstration(
            f"Add {a} and {b}.", worked_addition(a, b, 2, forgets_carry=index in forgetful), a + b, "generated"
        )
        for index, (a, b) in enumerate(sums)
    )
