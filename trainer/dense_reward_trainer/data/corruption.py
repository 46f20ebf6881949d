"""One planted error in a text, and where it stands: the known truth of error localisation and of label noise.

Pure functions of a text and a random generator. Must not know tokens, models, or where the text comes from.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Self

DIGITS = "0123456789"
Kind = Literal["digit", "number", "word", "step"]
_NUMBER = re.compile(r"[0-9]+")
_WORD = re.compile(r"[A-Za-z]{2,}")


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


@dataclass(frozen=True, slots=True)
class Corrupter:
    """Plants errors of one kind. Other words and steps are those of the texts that it was made of."""

    kind: Kind
    words: dict[tuple[int, bool], list[str]]
    steps: dict[int, list[str]]

    @classmethod
    def of(cls, kind: Kind, texts: Iterable[str]) -> Self:
        """From the right answers of a task."""
        words: dict[tuple[int, bool], set[str]] = defaultdict(set)
        steps: dict[int, set[str]] = defaultdict(set)
        for text in texts:
            for word in _WORD.findall(text):
                words[_shape(word)].add(word)
            for step in text.split("\n")[:-1]:
                steps[len(step)].add(step)
        return cls(
            kind,
            {shape: sorted(found) for shape, found in words.items()},
            {length: sorted(found) for length, found in steps.items()},
        )

    def __call__(self, text: str, rng: random.Random) -> Corruption | None:
        """An error in a text of the same length; None where it has nothing of the kind, or nothing to put there."""
        match self.kind:
            case "digit":
                return corrupt(text, rng) if any(character in DIGITS for character in text) else None
            case "number":
                return number_corruption(text, rng)
            case "word":
                spans = [match.span() for match in _WORD.finditer(text)]
                return _replaced(text, spans, lambda old: self.words.get(_shape(old), []), rng)
            case "step":
                return _replaced(text, _step_spans(text), lambda old: self.steps.get(len(old), []), rng)


def _shape(word: str) -> tuple[int, bool]:
    """Words are exchanged for others of their length that begin alike, in upper or lower case."""
    return len(word), word[0].isupper()


def _step_spans(text: str) -> list[tuple[int, int]]:
    """Each line but the last, which states the final answer."""
    spans, start = [], 0
    for line in text.split("\n")[:-1]:
        if line:
            spans.append((start, start + len(line)))
        start += len(line) + 1
    return spans


def _replaced(
    text: str, spans: list[tuple[int, int]], others: Callable[[str], list[str]], rng: random.Random
) -> Corruption | None:
    """One span, uniform over those that something else of their length can stand in for."""
    choices = [
        (span, found) for span in spans if (found := [o for o in others(text[slice(*span)]) if o != text[slice(*span)]])
    ]
    if not choices:
        return None
    (start, end), found = rng.choice(choices)
    return Corruption(text[:start] + rng.choice(found) + text[end:], start, end)


def _other_number(number: str, rng: random.Random) -> str:
    # Digits are drawn one by one because Python refuses to turn very long strings into integers.
    first = DIGITS if number.startswith("0") else DIGITS[1:]
    other = number
    while other == number:
        other = rng.choice(first) + "".join(rng.choices(DIGITS, k=len(number) - 1))
    return other
