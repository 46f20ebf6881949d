"""Worked additions and two-step word problems: few, many or noisy demonstrations, and prompts of another kind.

Pure functions of the options and a seed. Must not import tokenizers or models.
"""

import random
from dataclasses import replace
from typing import Literal

from pydantic import Field, ValidationError

from dense_reward_trainer.configs.base import JobOptions
from dense_reward_trainer.data.arithmetic import ArithmeticOptions, Digits, Problem, generate
from dense_reward_trainer.data.corruption import digit_corruption
from dense_reward_trainer.data.records import DataError, Demonstration
from dense_reward_trainer.tasks.records import TaskData, demonstration

Kind = Literal["additions", "two_step"]
# Added to the seed of prompts and tests that are not drawn with the demonstrations: far from the seeds of other cells,
# whose demonstrations would be these very problems.
OTHER_PROBLEMS = 1_000_000


class WorkedTask(JobOptions):
    """Worked additions, or word problems of two steps."""

    name: Kind
    digits: Digits | tuple[Digits, ...] = Field(default=3, description="Digits of the numbers in demonstrations.")
    demonstrations: int = Field(default=3000, ge=1, description="Demonstrations, each with a different prompt.")
    label_noise: float = Field(default=0.0, ge=0.0, le=1.0, description="Share of them that get one wrong digit.")
    prompts: int | None = Field(
        default=None, ge=1, description="Prompts of DPR; null: those of the demonstrations, else others."
    )
    prompt_digits: Digits | tuple[Digits, ...] | None = Field(
        default=None, description="Digits of the numbers in prompts and tests; null: as in demonstrations."
    )
    prompt_kind: Kind | None = Field(
        default=None, description="Kind of the problems in prompts and tests; null: as the demonstrations."
    )
    test: int = Field(default=300, ge=1, description="Test problems; none is in the demonstrations or the prompts.")

    def data(self, seed: int) -> TaskData:
        """The demonstrations, prompts and tests of a seed. Raises DataError if there are not enough problems."""
        if (self.prompts, self.prompt_digits, self.prompt_kind) == (None, None, None):
            problems = _problems(self.name, self.digits, self.demonstrations + self.test, seed)
            train = self._noisy(problems[: self.demonstrations], seed)
            return TaskData(train, train, _demonstrations(problems[self.demonstrations :]))
        trained = _problems(self.name, self.digits, self.demonstrations, seed)
        taken = {problem.prompt for problem in trained}
        kind, digits = self.prompt_kind or self.name, self.prompt_digits or self.digits
        wanted = (self.prompts or self.demonstrations) + self.test
        drawn = _problems(kind, digits, wanted + len(trained), seed + OTHER_PROBLEMS)
        others = _demonstrations([one for one in drawn if one.prompt not in taken][:wanted])
        return TaskData(self._noisy(trained, seed), others[self.test :], others[: self.test])

    def _noisy(self, problems: list[Problem], seed: int) -> tuple[Demonstration, ...]:
        """Demonstrations of which the share `label_noise` gets one wrong digit."""
        rng = random.Random(seed)
        wrong = set(rng.sample(range(len(problems)), round(self.label_noise * len(problems))))
        return _demonstrations(
            [
                replace(one, response=digit_corruption(one.response, rng).text) if index in wrong else one
                for index, one in enumerate(problems)
            ]
        )


def _problems(name: Kind, digits: int | tuple[int, ...], count: int, seed: int) -> list[Problem]:
    kind: Literal["addition", "two_step"] = "addition" if name == "additions" else "two_step"
    try:
        return generate(ArithmeticOptions(kind=kind, digits=digits, demonstrations=count, seed=seed))
    except ValidationError as error:
        raise DataError(f"task {name}: {error.errors(include_url=False)[0]['msg']}") from None


def _demonstrations(problems: list[Problem]) -> tuple[Demonstration, ...]:
    return tuple(demonstration(one.prompt, one.response, one.answer, "generated") for one in problems)
