"""Generates two-step word problems with worked solutions; every number of a solution follows from the prompt.

Pure functions of a random generator. Must not import files, tokenizers or models.
"""

import random
from dataclasses import dataclass

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
