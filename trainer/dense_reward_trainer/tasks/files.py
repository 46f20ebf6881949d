"""A task from the user's own files."""

import random
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobOptions
from dense_reward_trainer.data.records import ChatMessage, DataError, Demonstration
from dense_reward_trainer.data.sources import DataSource, load, split
from dense_reward_trainer.tasks.records import TaskData


class FilesTask(JobOptions):
    """Demonstrations in any source that `sft` reads; a seed changes training and samples, and who demonstrates what."""

    name: Literal["files"]
    train: DataSource = Field(description="Demonstrations of SFT. Its held-out part is the test if `test` is null.")
    test: DataSource | None = Field(default=None, description="Test problems with their answers; all rows are used.")
    prompts: DataSource | None = Field(default=None, description="Prompts of DPR; null: those of `train`.")
    base: DataSource | None = Field(default=None, description="What a base model is trained on first; null: none.")
    samples: DataSource | None = Field(
        default=None, description="Other answers to prompts of `train`, such as samples of the base; null: none."
    )
    sampled_share: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of the demonstrations that learn one of `samples` instead."
    )

    @model_validator(mode="after")
    def _something_to_test_on(self) -> Self:
        if self.test is None and self.train.held_out_fraction == 0:
            raise ValueError("nothing to test on: set test, or train.held_out_fraction above 0")
        if self.samples is None and self.sampled_share > 0:
            raise ValueError("sampled_share is that of samples: set samples too, or leave it out")
        return self

    def data(self, seed: int) -> TaskData:
        """The rows of the files, the same for every seed but for the demonstrations that `samples` replace.

        Raises DataError if a test prompt is trained on, or if too few prompts have a sample.
        """
        parts = split(load(self.train).demonstrations, self.train.held_out_fraction, self.train.seed)
        test = parts.held_out if self.test is None else load(self.test).demonstrations
        prompts = parts.train if self.prompts is None else load(self.prompts, prompts_only=True).demonstrations
        base = () if self.base is None else load(self.base).demonstrations
        for side, rows in (("train", parts.train), ("prompts", prompts), ("base", base)):
            _check_apart(side, rows, test)
        train = parts.train
        if self.samples is not None:
            train = mixed(train, load(self.samples).demonstrations, self.sampled_share, random.Random(seed))
        return TaskData(train, prompts, test, base)


def mixed(
    demonstrations: tuple[Demonstration, ...], samples: tuple[Demonstration, ...], share: float, rng: random.Random
) -> tuple[Demonstration, ...]:
    """Exactly this share of the demonstrations, to the nearest one, gets the response of a sample to its prompt.

    Right final answers stay. Raises DataError if fewer prompts have a sample.
    """
    found: dict[tuple[ChatMessage, ...], list[Demonstration]] = {}
    for sample in samples:
        found.setdefault(sample.prompt_messages, []).append(sample)
    answered = [index for index, one in enumerate(demonstrations) if one.prompt_messages in found]
    wanted = round(share * len(demonstrations))
    if len(answered) < wanted:
        raise DataError(
            f"sampled_share {share:g} is {wanted} of {len(demonstrations)} demonstrations, but only {len(answered)} of "
            "their prompts have a sample: sample more of them, or lower sampled_share"
        )
    rows = list(demonstrations)
    for index in sorted(rng.sample(answered, wanted)):
        response = rng.choice(found[rows[index].prompt_messages]).messages[-1]
        rows[index] = replace(rows[index], messages=(*rows[index].prompt_messages, response))
    return tuple(rows)


def _check_apart(side: str, rows: tuple[Demonstration, ...], test: tuple[Demonstration, ...]) -> None:
    trained = {one.prompt_messages for one in rows}
    shared = [one for one in test if one.prompt_messages in trained]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(test)} test prompts are also in `{side}`, the first is {shared[0].source}: remove "
            "them from one of the two"
        )
