"""One planted error in a text, and where it stands: the known truth of error localisation and of label noise.

Pure functions of a text and a random generator. Must not know tokens, models, or where the text comes from.
"""

import random
import re
from dataclasses import dataclass

DIGITS = "0123456789"
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class Corruption:
    """A text with one error in it; `start` and `end` are the error's code-point span, the same in the original."""

    text: str
    start: int
    end: int


def corrupt(response: str, rng: random.Random) -> Corruption:
    """Replaces one digit, uniform over the ASCII digits of `response`, by one of the nine others, uniformly.

    Raises ValueError when the response has no digit.
    """
    positions = [position for position, character in enumerate(response) if character in DIGITS]
    if not positions:
        raise ValueError(f"no digit to replace in the response {response[:80]!r}: give a response with a number in it")
    start = rng.choice(positions)
    wrong = rng.choice(DIGITS.replace(response[start], ""))
    return Corruption(response[:start] + wrong + response[start + 1 :], start, start + 1)


def number_corruption(text: str, rng: random.Random) -> Corruption | None:
    """Replaces one number, uniform over the maximal runs of ASCII digits, by another with as many digits.

    Each other number of that length is as likely; it starts with 0 only where the original did. None when the text
    has no number.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    chosen = rng.choice(numbers)
    wrong = _other_number(chosen.group(), rng)
    return Corruption(text[: chosen.start()] + wrong + text[chosen.end() :], chosen.start(), chosen.end())


def _other_number(number: str, rng: random.Random) -> str:
    # Digits are drawn one by one because Python refuses to turn very long strings into integers.
    first = DIGITS if number.startswith("0") else DIGITS[1:]
    other = number
    while other == number:
        other = rng.choice(first) + "".join(rng.choices(DIGITS, k=len(number) - 1))
    return other
