"""Scores the responses of a benchmark under all references: a number for each step, or for each response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from dense_reward.records import FloatArray

from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.aggregates import aggregate
from dense_reward_trainer.credit.error_localisation import offsets_of
from dense_reward_trainer.credit.first_wrong_step import steps_of
from dense_reward_trainer.credit.judged_answers import AGGREGATES
from dense_reward_trainer.credit.references import Answer, References
from dense_reward_trainer.data.process_labels import Solution
from dense_reward_trainer.rl.reward_service import Chat
from dense_reward_trainer.runs.progress import Progress

StepValue = Literal["mean", "min"]
"""How the signals of a step's tokens become its value."""
STEP_VALUES: tuple[StepValue, ...] = get_args(StepValue)


@dataclass(frozen=True, slots=True)
class StepScores:
    """Values of steps, by column and by how they are computed, solution by solution; no value: it was too long."""

    values: dict[str, dict[StepValue, list[list[float]]]]

    @property
    def too_long(self) -> int:
        """How many solutions exceed the service's limit, and were not scored."""
        return sum(not row for row in next(iter(self.values.values()))["mean"])


@dataclass(frozen=True, slots=True)
class ResponseScores:
    """Scores of the responses to each prompt, by column and aggregate. `too_long`: prompts that were not scored."""

    values: dict[str, dict[Aggregate, list[list[float]]]]
    too_long: int


def score_steps(references: References, solutions: Sequence[Solution], title: str) -> StepScores:
    """Scores every solution once. Raises JobError if the service cannot."""
    values: dict[str, dict[StepValue, list[list[float]]]] = {
        column: {how: [] for how in STEP_VALUES} for column in references.columns
    }
    answers = _answers(references, [_chat(one.problem, one.text) for one in solutions], title)
    for solution, answer in zip(solutions, answers, strict=True):
        tokens = [] if answer is None else tokens_of_steps(solution, offsets_of(answer.scored))
        for column, found in values.items():
            for how, rows in found.items():
                rows.append([] if answer is None else step_values(answer.signals[column], tokens, how))
    return StepScores(values)


def score_responses(
    references: References, responses: Sequence[tuple[str, Sequence[str]]], window: int, title: str
) -> ResponseScores:
    """Scores every response to every prompt. A prompt with a response that is too long has none. Raises JobError."""
    values: dict[str, dict[Aggregate, list[list[float]]]] = {
        column: {name: [] for name in AGGREGATES} for column in references.columns
    }
    chats = [_chat(prompt, text) for prompt, texts in responses for text in texts]
    answers = _answers(references, chats, title)
    too_long = 0
    for _, texts in responses:
        group = [next(answers) for _ in texts]
        whole = [answer for answer in group if answer is not None and answer.scored.length]
        too_long += len(whole) < len(group)
        for column, found in values.items():
            for name, rows in found.items():
                scores = [aggregate(answer.signals[column], name, window) for answer in whole]
                rows.append(scores if len(whole) == len(group) else [])
    return ResponseScores(values, too_long)


def tokens_of_steps(solution: Solution, offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The tokens of each step: those that end in it; if none does, the one that covers its last character."""
    step_T = steps_of(solution, offsets)
    ends_T = np.array([end for _, end in offsets])
    return [
        np.flatnonzero(step_T == step).tolist() or [min(int(np.searchsorted(ends_T, end)), len(ends_T) - 1)]
        for step, (_, end) in enumerate(solution.spans)
    ]


def step_values(values_T: FloatArray, tokens: Sequence[Sequence[int]], how: StepValue) -> list[float]:
    """The value of each step, whose tokens are given."""
    return [aggregate(values_T[list(step)], how) for step in tokens]


def _answers(references: References, chats: Sequence[Chat], title: str) -> Iterator[Answer | None]:
    progress = Progress(len(chats), title)
    return progress.each(references.score_each(chats, ["offsets"]), lambda one: 0 if one is None else one.scored.length)


def _chat(problem: str, response: str) -> Chat:
    return [{"role": "user", "content": problem}, {"role": "assistant", "content": response}]
