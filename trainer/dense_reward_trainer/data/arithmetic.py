"""Worked additions with carries, and two-step word problems: the truth of every single token is known.

Each character of a clean response follows from its prompt, so an error that was planted in one is an error for certain.
Pure functions of the options and their seed. Must not know files, tokenizers or models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dense_reward_trainer.data.corruption import corrupt
from dense_reward_trainer.data.word_problems import NAMES, THINGS, two_step

# Nine digits is the most for which the number of problems fits the sampler's 64-bit range.
Digits = Annotated[int, Field(ge=1, le=9)]


def _addends(digits: int) -> range:
    return range(10 ** (digits - 1), 10**digits)


class ArithmeticOptions(BaseModel):
    """Which problems to generate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    demonstrations: int = Field(default=3000, ge=1, description="How many demonstrations, each with its own prompt.")
    kind: Literal["addition", "two_step"] = Field(
        default="addition", description="Additions worked column by column, or word problems of two steps."
    )
    digits: Digits | tuple[Digits, ...] = Field(
        default=3,
        description="Digits of each number, the first of them 1 to 9; of several counts each has an equal share.",
    )
    label_noise: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Fraction of the demonstrations with one wrong digit in the response, rounded to whole ones.",
    )
    seed: int = Field(default=0, description="Seed of the problems and of the noise.")

    @model_validator(mode="after")
    def _enough_problems(self) -> Self:
        for digits, count in self.shares.items():
            additions = len(_addends(digits)) ** 2
            # of word problems this is far less than there are, so that drawing anew in place of repeats ends soon
            available = additions if self.kind == "addition" else additions * len(NAMES) * len(THINGS)
            if count > available:
                raise ValueError(
                    f"{count} demonstrations with prompts of their own were asked for, but only {available} "
                    f"problems of {digits}-digit numbers are drawn: ask for at most {available} or for more digits"
                )
        return self

    @property
    def shares(self) -> dict[int, int]:
        """How many problems have numbers of how many digits. Raises ValueError where a count is named twice."""
        counts = (self.digits,) if isinstance(self.digits, int) else self.digits
        if len(set(counts)) < max(len(counts), 1):
            raise ValueError(f"digits {list(counts)} must name one count or several different ones")
        each, more = divmod(self.demonstrations, len(counts))
        return {digits: each + (place < more) for place, digits in enumerate(counts)}


@dataclass(frozen=True, slots=True)
class Problem:
    """`answer` is right, also where `clean` is False: there one digit of the response was replaced by a wrong one."""

    prompt: str
    response: str
    answer: int
    clean: bool = True


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
    kind = _additions if options.kind == "addition" else _word_problems
    problems = [problem for digits, count in options.shares.items() for problem in kind(digits, count, rng)]
    if len(options.shares) > 1:
        rng.shuffle(problems)
    for index in rng.sample(range(len(problems)), round(options.label_noise * len(problems))):
        wrong = corrupt(problems[index].response, rng)
        problems[index] = replace(problems[index], response=wrong.text, clean=False)
    return problems


def _additions(digits: int, count: int, rng: random.Random) -> Iterator[Problem]:
    addends = _addends(digits)
    for index in rng.sample(range(len(addends) ** 2), count):
        a, b = addends[index // len(addends)], addends[index % len(addends)]
        yield Problem(f"Add {a} and {b}.", worked(a, b, digits), a + b)


def _word_problems(digits: int, count: int, rng: random.Random) -> Iterator[Problem]:
    seen: set[str] = set()
    while len(seen) < count:
        drawn = two_step(digits, rng)
        if drawn.prompt not in seen:
            seen.add(drawn.prompt)
            yield Problem(drawn.prompt, drawn.response, drawn.answer)
