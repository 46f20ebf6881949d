"""Answers that are known to be right or wrong, and how every signal and aggregate ranks them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, get_args

from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.aggregates import aggregate
from dense_reward_trainer.credit.auroc import Interval, auroc_interval
from dense_reward_trainer.credit.calibration import Calibration, calibration
from dense_reward_trainer.credit.references import Answer
from dense_reward_trainer.errors import ConfigError

AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one aggregate of one signal ranks: AUROC of right against wrong answers, and calibration of P(right | it).

    `calibration` is null if there are too few answers of either kind to fit and judge it.
    """

    auroc: Interval
    calibration: Calibration | None


Rankings = dict[str, dict[Aggregate, Ranking]]
"""The ranking by column and aggregate."""


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """For each answer: whether it is right, its prompt's index, and its score by column and aggregate."""

    right: list[bool]
    prompt: list[int]
    scores: dict[str, dict[Aggregate, list[float]]]

    @classmethod
    def of_columns(cls, columns: Iterable[str]) -> Self:
        """No answers yet."""
        return cls([], [], {column: {name: [] for name in AGGREGATES} for column in columns})

    @property
    def counts(self) -> tuple[int, int]:
        """Number of right answers, and of wrong ones."""
        return sum(self.right), len(self.right) - sum(self.right)

    @property
    def not_ranked(self) -> str | None:
        """Why the answers cannot be ranked, with the cure: right ones or wrong ones are missing. None if they can."""
        right, wrong = self.counts
        if right and wrong:
            return None
        return (
            f"{right} samples are right and {wrong} are wrong, but ranking compares the two, so there is none: raise "
            "samples, give another policy or checker, or set policy=null to measure only planted errors"
        )

    def add(self, answer: Answer, *, right: bool, prompt: int, window: int) -> None:
        """Add one scored answer to the prompt of this index. `window`: see `aggregate`."""
        self.right.append(right)
        self.prompt.append(prompt)
        for column, values_T in answer.signals.items():
            for name in AGGREGATES:
                self.scores[column][name].append(aggregate(values_T, name, window))

    def ranking(self, seed: int) -> Rankings:
        """The ranking by each column and aggregate. Raises ConfigError if right or wrong answers are missing."""
        if self.not_ranked is not None:
            raise ConfigError(self.not_ranked)
        return {
            column: {name: self._ranking(found, seed) for name, found in scores.items()}
            for column, scores in self.scores.items()
        }

    def _ranking(self, scores: list[float], seed: int) -> Ranking:
        return Ranking(
            auroc_interval(scores, self.right, self.prompt, seed), calibration(scores, self.right, self.prompt, seed)
        )
