"""What a task consists of. Must not import tokenizers or models."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dense_reward_trainer.data.records import ChatMessage, Demonstration


@dataclass(frozen=True, slots=True)
class TaskData:
    """The demonstrations of a task; `answer` of each is the right final answer, also if its response is wrong.

    `base`: what the base model is trained on, empty if the task has none. `train`: what the SFT model is trained on.
    `prompts`: prompts for reinforcement learning, whose responses are not used. `test`: right answers to other prompts.
    """

    train: tuple[Demonstration, ...]
    prompts: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    base: tuple[Demonstration, ...] = ()


class Task(Protocol):
    """A task: options that make the same data for the same seed."""

    def data(self, seed: int) -> TaskData:
        """Raises DataError if the options or the files cannot be used."""
        ...


def demonstration(prompt: str, response: str, answer: object, source: str) -> Demonstration:
    """One prompt, the response to learn, and the right answer."""
    return Demonstration((ChatMessage("user", prompt), ChatMessage("assistant", response)), str(answer), source)


def share_right(demonstrations: Iterable[Demonstration], answer_of: "AnswerOf") -> float | None:
    """The share of the responses whose own final answer is the right one; None if no right answer is known."""
    judged = [answer_of(one.response) == one.answer for one in demonstrations if one.answer is not None]
    return sum(judged) / len(judged) if judged else None


class AnswerOf(Protocol):
    """Finds the final answer that a response states."""

    def __call__(self, text: str, /) -> str | None: ...
