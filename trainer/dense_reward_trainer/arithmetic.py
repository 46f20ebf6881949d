"""Worked additions with carries: demonstrations in which the truth of every single token is known.

Each character of a clean response follows from its prompt, so an error that was planted in one is an error for certain.
Pure functions of the options and their seed. Must not know files, tokenizers or models.
"""

import random
from dataclasses import dataclass, replace
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dense_reward_trainer.corruption import corrupt


def _addends(digits: int) -> range:
    return range(10 ** (digits - 1), 10**digits)


class ArithmeticOptions(BaseModel):
    """Which additions to generate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    demonstrations: int = Field(default=3000, ge=1, description="How many demonstrations, each with its own prompt.")
    # Nine digits is the most for which the number of problems fits the sampler's 64-bit range.
    digits: int = Field(default=3, ge=1, le=9, description="Digits of each addend, the first of them 1 to 9.")
    label_noise: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Fraction of the demonstrations with one wrong digit in the response, rounded to whole ones.",
    )
    seed: int = Field(default=0, description="Seed of the problems and of the noise.")

    @model_validator(mode="after")
    def _enough_problems(self) -> Self:
        available = len(_addends(self.digits)) ** 2
        if self.demonstrations > available:
            raise ValueError(
                f"{self.demonstrations} demonstrations with prompts of their own were asked for, but only {available} "
                f"additions of {self.digits}-digit numbers exist: ask for at most {available} or for more digits"
            )
        return self


@dataclass(frozen=True, slots=True)
class Problem:
    """One addition. `clean` is False where one digit of the response was replaced by a wrong one."""

    a: int
    b: int
    prompt: str
    response: str
    clean: bool


def worked(a: int, b: int, digits: int) -> str:
    """The only right response to "Add a and b.": one line for each column, units first, then `#### sum`.

    A column reads `7+6+1=14 write 4 carry 1`, the third addend being the carry that came in, also when it is 0; the
    first column has none. Raises ValueError when a or b does not have exactly `digits` digits.
    """
    for addend in (a, b):
        if addend not in _addends(digits):
            raise ValueError(f"{addend} does not have exactly {digits} digits (no sign, no leading zero)")
    lines: list[str] = []
    carry = 0
    for column in range(digits):
        addends = [a // 10**column % 10, b // 10**column % 10] + ([carry] if column else [])
        carry, written = divmod(sum(addends), 10)
        lines.append(f"{'+'.join(map(str, addends))}={sum(addends)} write {written} carry {carry}")
    return "\n".join([*lines, f"#### {a + b}"])


def generate(options: ArithmeticOptions) -> list[Problem]:
    """The problems of these options: always the same for the same options, no prompt twice.

    `round(label_noise * demonstrations)` of them, drawn at random, hold one wrong digit and are otherwise unchanged, so
    they contradict themselves. Options that differ in `label_noise` alone give the same prompts in the same order.
    """
    rng = random.Random(options.seed)
    addends = _addends(options.digits)
    pairs = [divmod(index, len(addends)) for index in rng.sample(range(len(addends) ** 2), options.demonstrations)]
    problems = [_problem(addends[first], addends[second], options.digits) for first, second in pairs]
    for index in rng.sample(range(len(problems)), round(options.label_noise * len(problems))):
        wrong = corrupt(problems[index].response, rng)
        problems[index] = replace(problems[index], response=wrong.text, clean=False)
    return problems


def _problem(a: int, b: int, digits: int) -> Problem:
    return Problem(a, b, f"Add {a} and {b}.", worked(a, b, digits), clean=True)
