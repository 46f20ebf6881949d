"""Configuration of the `credit` job. Must not import torch: the command line parses before it imports anything slow."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import Seed
from dense_reward_trainer.configs.dpr import CHECKER, THREADS, Device
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServicePairsConfig
from dense_reward_trainer.configs.signals import WINDOW_TOKENS
from dense_reward_trainer.data.corruption import ErrorKind
from dense_reward_trainer.data.final_answers import AnswerChecker
from dense_reward_trainer.data.sources import DataSource


class CreditConfig(ServicePairsConfig):
    """Measures the references of a run: do their rewards locate planted errors, and rank right above wrong answers?"""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "device", "threads"}

    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )
    data: DataSource = Field(description="Right answers that the pair was not trained on, for example held_out.jsonl.")
    corruptions: tuple[ErrorKind, ...] = Field(
        default=("digit",),
        description="Kinds of planted errors. digit: one digit. number: one number. word: one word. step: one line "
        "except the last. Digits and numbers are drawn at random, words and lines from the data. Every "
        "replacement has the same length, and the answer keeps its number of tokens. Empty: none are planted.",
    )
    against: Literal["tokens", "digit_tokens"] = Field(
        default="tokens",
        description="Tokens of the answer that the error is compared with: all others, or only those with a digit.",
    )
    answers: int = Field(default=200, ge=1, description="Number of answers that get an error, for each kind.")
    solutions: Path | None = Field(
        default=None,
        description="File of ProcessBench or PRM800K: is the reward of the first wrong step lower than those of the "
        "steps before it? null: not measured.",
    )
    policy: Path | None = Field(
        default=None,
        description="Checkpoint whose sampled answers are ranked, right against wrong; null: not measured.",
    )
    checker: AnswerChecker = Field(default="final_answer", description=CHECKER)
    samples: int = Field(
        default=1000, ge=1, description="Answers to sample, at temperature 1: ceil(samples / prompts) for each prompt."
    )
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="Maximum length in tokens. Longer samples are cut off and count as wrong.",
    )
    window_tokens: int = Field(
        default=WINDOW_TOKENS,
        ge=1,
        description="The aggregate window_min is the least mean over this many consecutive tokens of an answer.",
    )
    device: Device = Field(default="cpu", description="Device on which the policy samples.")
    threads: int | None = Field(default=None, ge=1, description=THREADS)
    seed: Seed = Field(default=0, description="Seed of the errors, the samples and the bootstrap.")

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not self.corruptions and self.policy is None and self.solutions is None:
            raise ValueError(
                "corruptions is empty, so nothing is measured: name a kind of error, or set policy or solutions"
            )
        return self
