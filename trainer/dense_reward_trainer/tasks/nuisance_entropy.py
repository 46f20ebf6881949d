"""Worked additions whose lines hold names, verbs and words that are free choices: entropy that is no error.

Names and words have Zipf-distributed frequencies, as in natural text. Pure functions of the options and a seed. Must
not import tokenizers or models.
"""

import random
from itertools import accumulate
from typing import Literal

from pydantic import Field

from dense_reward_trainer.configs.base import JobOptions
from dense_reward_trainer.data.arithmetic import ArithmeticOptions, Digits, generate
from dense_reward_trainer.data.records import Demonstration
from dense_reward_trainer.tasks.records import TaskData, demonstration

VERBS = ("says", "writes", "finds", "gets", "notes", "reads", "adds", "sees")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class NuisanceEntropyTask(JobOptions):
    """Additions in which each line reads `NAME VERB 7+6=13 write 3 carry 1 , WORD WORD`."""

    name: Literal["nuisance_entropy"]
    digits: Digits = Field(default=3, description="Digits of each number.")
    demonstrations: int = Field(default=3000, ge=1, description="Demonstrations, each with a different prompt.")
    names: int = Field(default=400, ge=1, le=5000, description="Different names.")
    words: int = Field(default=300, ge=1, le=5000, description="Different words after the comma.")
    test: int = Field(default=300, ge=1, description="Test problems.")

    def data(self, seed: int) -> TaskData:
        """The demonstrations and tests of a seed. The names and words are the same for all seeds."""
        rng = random.Random(seed)
        lines = _Lines(self.names, self.words, rng)
        options = ArithmeticOptions(digits=self.digits, demonstrations=self.demonstrations + self.test, seed=seed)
        rows = [
            demonstration(one.prompt, lines.wrapped(one.response), one.answer, "generated") for one in generate(options)
        ]
        train: tuple[Demonstration, ...] = tuple(rows[: self.demonstrations])
        return TaskData(train, train, tuple(rows[self.demonstrations :]))


class _Lines:
    """Draws the free choices of each line."""

    def __init__(self, names: int, words: int, rng: random.Random) -> None:
        self._rng = rng
        self._names = [word.capitalize() for word in pseudo_words(names, seed=11)]
        self._words = pseudo_words(words, seed=12)
        self._name_weights, self._word_weights = _zipf(names), _zipf(words)

    def wrapped(self, response: str) -> str:
        """The response with a name, a verb and two words around each line but the last."""
        *worked, answer = response.split("\n")
        return "\n".join([*(self._line(line) for line in worked), answer])

    def _line(self, line: str) -> str:
        name = self._rng.choices(self._names, cum_weights=self._name_weights)[0]
        first, second = self._rng.choices(self._words, cum_weights=self._word_weights, k=2)
        return f"{name} {self._rng.choice(VERBS)} {line} , {first} {second}"


def pseudo_words(count: int, seed: int) -> list[str]:
    """Different words of two or three syllables."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = rng.choice((2, 3))
        found["".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))] = None
    return list(found)


def _zipf(count: int) -> list[float]:
    """Cumulative weights of frequencies proportional to 1 / rank (Zipf)."""
    return list(accumulate(1 / rank for rank in range(1, count + 1)))
