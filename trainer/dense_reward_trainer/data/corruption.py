"""Plants one error in a text and records its span: the ground truth of error localisation, and label noise.

Pure functions of a text and a random generator. Must not import files, tokenizers or models.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Self

DIGITS = "0123456789"
ErrorKind = Literal["digit", "number", "word", "step"]
NEEDED: dict[ErrorKind, str] = {
    "digit": "a digit",
    "number": "a number",
    "word": "a word of two or more letters for which the data have another one of the same length and case",
    "step": "a line before its last one for which the data have another one of the same length",
}
_NUMBER = re.compile(r"[0-9]+")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, slots=True)
class Corruption:
    """A text with one error. `start` and `end`: code-point span of the error, the same in the original text."""

    text: str
    start: int
    end: int


def digit_corruption(text: str, rng: random.Random) -> Corruption:
    """Replaces one ASCII digit of the text, drawn uniformly, by one of the nine others, drawn uniformly.

    Raises ValueError if the text has no digit.
    """
    positions = [position for position, character in enumerate(text) if character in DIGITS]
    if not positions:
        raise ValueError(f"no digit to replace in {text[:80]!r}: give a text with a number in it")
    start = rng.choice(positions)
    wrong = rng.choice(DIGITS.replace(text[start], ""))
    return Corruption(text[:start] + wrong + text[start + 1 :], start, start + 1)


def number_corruption(text: str, rng: random.Random) -> Corruption | None:
    """Replaces one number, drawn uniformly from the maximal runs of ASCII digits, by another of the same length.

    All other numbers of that length are equally likely, but the new one starts with 0 only if the old one does. None if
    the text has no number.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    chosen = rng.choice(numbers)
    wrong = _other_number(chosen.group(), rng)
    return Corruption(text[: chosen.start()] + wrong + text[chosen.end() :], chosen.start(), chosen.end())


@dataclass(frozen=True, slots=True)
class Corrupter:
    """Plants errors of one kind. Replacement words and steps come from the texts given to `of`."""

    kind: ErrorKind
    words: dict[tuple[int, bool], list[str]]
    steps: dict[int, list[str]]

    @classmethod
    def of(cls, kind: ErrorKind, texts: Iterable[str]) -> Self:
        """A corrupter whose replacements come from `texts`, the right answers of a task."""
        words: dict[tuple[int, bool], set[str]] = defaultdict(set)
        steps: dict[int, set[str]] = defaultdict(set)
        for text in texts:
            for word in _WORD.findall(text):
                words[_shape(word)].add(word)
            for step in text.split("\n")[:-1]:
                steps[len(step)].add(step)
        return cls(
            kind,
            {shape: sorted(same_shape) for shape, same_shape in words.items()},
            {length: sorted(same_length) for length, same_length in steps.items()},
        )

    def __call__(self, text: str, rng: random.Random) -> Corruption | None:
        """The text with an error of the same length; None if it has nothing of the kind, or no replacement for it."""
        match self.kind:
            case "digit":
                return digit_corruption(text, rng) if any(character in DIGITS for character in text) else None
            case "number":
                return number_corruption(text, rng)
            case "word":
                spans = [match.span() for match in _WORD.finditer(text)]
                return _replaced(text, spans, lambda old: self.words.get(_shape(old), []), rng)
            case "step":
                return _replaced(text, _step_spans(text), lambda old: self.steps.get(len(old), []), rng)


def _shape(word: str) -> tuple[int, bool]:
    """Length, and whether the first letter is a capital: a word is replaced by another of the same shape."""
    return len(word), word[0].isupper()


def _step_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the lines, without empty ones and without the last, which states the final answer."""
    spans, start = [], 0
    for line in text.split("\n")[:-1]:
        if line:
            spans.append((start, start + len(line)))
        start += len(line) + 1
    return spans


def _replaced(
    text: str, spans: list[tuple[int, int]], others: Callable[[str], list[str]], rng: random.Random
) -> Corruption | None:
    """Replaces one span, drawn uniformly from those that have a replacement; None if none has."""
    choices = []
    for start, end in spans:
        replacements = [other for other in others(text[start:end]) if other != text[start:end]]
        if replacements:
            choices.append((start, end, replacements))
    if not choices:
        return None
    start, end, replacements = rng.choice(choices)
    return Corruption(text[:start] + rng.choice(replacements) + text[end:], start, end)


def _other_number(number: str, rng: random.Random) -> str:
    # Draws digit by digit: Python refuses to convert integers of more than 4300 digits to and from text.
    first = DIGITS if number.startswith("0") else DIGITS[1:]
    other = number
    while other == number:
        other = rng.choice(first) + "".join(rng.choices(DIGITS, k=len(number) - 1))
    return other
