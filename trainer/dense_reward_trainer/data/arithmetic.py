"""Generates worked additions and two-step word problems; the right value of every token is known.

Each character of a clean response follows from its prompt, so a planted error is certainly an error. Pure functions of
the options and their seed. Must not import files, tokenizers or models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dense_reward_trainer.data.corruption import digit_corruption

# random.sample needs the number of problems, 81 * 100 ** (digits - 1), to fit in 64 bits: at most nine digits.
Digits = Annotated[int, Field(ge=1, le=9)]
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "tickets")
# an event in words, and its sign: +1 adds things, -1 removes them
EVENTS = (
    ("buys {n} more", 1),
    ("finds {n} more", 1),
    ("is given {n} more", 1),
    ("gives away {n}", -1),
    ("loses {n}", -1),
    ("sells {n}", -1),
)


def _addends(digits: int) -> range:
    return range(10 ** (digits - 1), 10**digits)


class ArithmeticOptions(BaseModel):
    """Which problems to generate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    demonstrations: int = Field(
        default=3000, ge=1, description="Number of demonstrations, each with a different prompt."
    )
    kind: Literal["addition", "two_step"] = Field(
        default="addition", description="Additions, worked out column by column, or word problems of two steps."
    )
    digits: Digits | tuple[Digits, ...] = Field(
        default=3,
        description="Digits of each number, without leading zeros. A list shares the problems equally among them.",
    )
    label_noise: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Fraction of the demonstrations that get one wrong digit in the response.",
    )
    novices: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Fraction of the additions answered by novices, who forget every carry. Only sums of two-digit "
        "numbers that carry from their units are drawn, so that these answers are wrong. null: no novices, any sum.",
    )
    seed: int = Field(default=0, description="Seed of the problems, of the label noise and of the novices.")

    @model_validator(mode="after")
    def _novices_add_two_digits(self) -> Self:
        if self.novices is not None and (self.kind, self.digits) != ("addition", 2):
            raise ValueError("novices answer additions of two-digit numbers: set digits to 2, or leave out novices")
        return self

    @model_validator(mode="after")
    def _enough_problems(self) -> Self:
        for digits, count in self.shares.items():
            additions = len(_addends(digits)) ** 2 if self.novices is None else len(carrying_sums())
            # Far fewer word problems than exist, so that a repeated problem is soon replaced by a new draw.
            available = additions if self.kind == "addition" else additions * len(NAMES) * len(THINGS)
            if count > available:
                raise ValueError(
                    f"{count} demonstrations with different prompts are too many: only {available} problems of "
                    f"{digits}-digit numbers are drawn: set at most {available}, or more digits"
                )
        return self

    @property
    def shares(self) -> dict[int, int]:
        """Digits -> number of problems with them. Raises ValueError if `digits` is empty or repeats a value."""
        counts = (self.digits,) if isinstance(self.digits, int) else self.digits
        if len(set(counts)) < max(len(counts), 1):
            raise ValueError(f"digits {list(counts)} must be one number or several different ones")
        each, more = divmod(self.demonstrations, len(counts))
        return {digits: each + (place < more) for place, digits in enumerate(counts)}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `clean` is False if the response is wrong; `answer` is right in any case."""

    prompt: str
    response: str
    answer: int
    clean: bool = True


def worked_addition(a: int, b: int, digits: int, *, forgets_carry: bool = False) -> str:
    """The only right response to "Add a and b.": one line for each column, units first, then `#### sum`.

    A column reads `7+6+1=14 write 4 carry 1`. Its third addend is the incoming carry, even if that is 0; the first
    column has none. With `forgets_carry`, every incoming carry is taken as 0: the response of a novice, wrong if any
    column but the last carries. Raises ValueError if a or b does not have exactly `digits` digits.
    """
    for addend in (a, b):
        if addend not in _addends(digits):
            raise ValueError(f"{addend} does not have exactly {digits} digits (no sign, no leading zero)")
    lines: list[str] = []
    carry = total = 0
    for column in range(digits):
        incoming = 0 if forgets_carry else carry
        addends = [a // 10**column % 10, b // 10**column % 10] + ([incoming] if column else [])
        carry, written = divmod(sum(addends), 10)
        total += written * 10**column
        lines.append(f"{'+'.join(map(str, addends))}={sum(addends)} write {written} carry {carry}")
    return "\n".join([*lines, f"#### {total + carry * 10**digits}"])


def carrying_sums() -> list[tuple[int, int]]:
    """All pairs of two-digit numbers whose units carry, in order."""
    return [(a, b) for a in _addends(2) for b in _addends(2) if a % 10 + b % 10 >= 10]


def generate(options: ArithmeticOptions) -> list[Problem]:
    """The problems of these options: the same for the same options, each with a different prompt.

    `round(label_noise * demonstrations)` of them, drawn at random, get one wrong digit and are otherwise unchanged, so
    they contradict themselves. Options that differ only in `label_noise`, or only in the share of `novices`, give the
    same prompts in the same order.
    """
    rng = random.Random(options.seed)
    if options.novices is not None:
        problems = _by_experts_and_novices(options.demonstrations, options.novices, rng)
    else:
        kind = _additions if options.kind == "addition" else _word_problems
        problems = [problem for digits, count in options.shares.items() for problem in kind(digits, count, rng)]
    if len(options.shares) > 1:
        rng.shuffle(problems)
    for index in rng.sample(range(len(problems)), round(options.label_noise * len(problems))):
        wrong = digit_corruption(problems[index].response, rng)
        problems[index] = replace(problems[index], response=wrong.text, clean=False)
    return problems


def _additions(digits: int, count: int, rng: random.Random) -> Iterator[Problem]:
    addends = _addends(digits)
    for index in rng.sample(range(len(addends) ** 2), count):
        a, b = addends[index // len(addends)], addends[index % len(addends)]
        yield Problem(f"Add {a} and {b}.", worked_addition(a, b, digits), a + b)


def _by_experts_and_novices(count: int, novices: float, rng: random.Random) -> list[Problem]:
    sums = rng.sample(carrying_sums(), count)
    forgetful = set(rng.sample(range(count), round(novices * count)))
    return [
        Problem(
            *(f"Add {a} and {b}.", worked_addition(a, b, 2, forgets_carry=index in forgetful), a + b),
            clean=index not in forgetful,
        )
        for index, (a, b) in enumerate(sums)
    ]


def _word_problems(digits: int, count: int, rng: random.Random) -> Iterator[Problem]:
    seen: set[str] = set()
    while len(seen) < count:
        drawn = two_step(digits, rng)
        if drawn.prompt not in seen:
            seen.add(drawn.prompt)
            yield Problem(drawn.prompt, drawn.response, drawn.answer)


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A word problem and its right response: one line for each step, then `#### answer`."""

    prompt: str
    response: str
    answer: int


def two_step(digits: int, rng: random.Random) -> WordProblem:
    """A number of things and two events that change it; each number in the prompt has exactly `digits` digits.

    No event removes more things than there are.
    """
    numbers = range(10 ** (digits - 1), 10**digits)
    held = rng.choice(numbers)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    events, steps, now = [], [], held
    for _ in range(2):
        change = rng.choice(numbers)
        text, sign = rng.choice([event for event in EVENTS if now + event[1] * change >= 0])
        events.append(text.format(n=change))
        steps.append(f"{now}{'+' if sign > 0 else '-'}{change}={now + sign * change}")
        now += sign * change
    prompt = f"{name} has {held} {things}, {events[0]} and then {events[1]}. How many are there now?"
    return WordProblem(prompt, "\n".join([*steps, f"#### {now}"]), now)
