"""Two-step word problems with worked solutions: what happens is told in words, every number of the solution follows.

Pure functions of a random generator. Must not know files, tokenizers or models.
"""

import random
from dataclasses import dataclass

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "tickets")
# what happens, and whether there are more or fewer afterwards
EVENTS = (
    ("buys {n} more", 1),
    ("finds {n} more", 1),
    ("is given {n} more", 1),
    ("gives away {n}", -1),
    ("loses {n}", -1),
    ("sells {n}", -1),
)


@dataclass(frozen=True, slots=True)
class WordProblem:
    """`response` is right, one line for each step and then `#### answer`."""

    prompt: str
    response: str
    answer: int


def two_step(digits: int, rng: random.Random) -> WordProblem:
    """A number of things, of which two events make more or fewer; each number has exactly `digits` digits.

    Nobody gives away more than there is.
    """
    numbers = range(10 ** (digits - 1), 10**digits)
    held = rng.choice(numbers)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    told, steps, now = [], [], held
    for _ in range(2):
        change = rng.choice(numbers)
        text, sign = rng.choice([event for event in EVENTS if now + event[1] * change >= 0])
        told.append(text.format(n=change))
        steps.append(f"{now}{'+' if sign > 0 else '-'}{change}={now + sign * change}")
        now += sign * change
    prompt = f"{name} has {held} {things}, {told[0]} and then {told[1]}. How many are there now?"
    return WordProblem(prompt, "\n".join([*steps, f"#### {now}"]), now)
