"""A task from the user's own files."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobOptions
from dense_reward_trainer.data.records import DataError, Demonstration
from dense_reward_trainer.data.sources import DataSource, load, split
from dense_reward_trainer.tasks.records import TaskData


class FilesTask(JobOptions):
    """Demonstrations in any source that `sft` reads; a seed changes training and samples only."""

    name: Literal["files"]
    train: DataSource = Field(description="Demonstrations of SFT. Its held-out part is the test if `test` is null.")
    test: DataSource | None = Field(default=None, description="Test problems with their answers; all rows are used.")
    prompts: DataSource | None = Field(default=None, description="Prompts of DPR; null: those of `train`.")
    base: DataSource | None = Field(default=None, description="What a base model is trained on first; null: none.")

    @model_validator(mode="after")
    def _something_to_test_on(self) -> Self:
        if self.test is None and self.train.held_out_fraction == 0:
            raise ValueError("nothing to test on: set test, or train.held_out_fraction above 0")
        return self

    def data(self, seed: int) -> TaskData:
        """The rows of the files, the same for every seed. Raises DataError if a test prompt is trained on."""
        parts = split(load(self.train).demonstrations, self.train.held_out_fraction, self.train.seed)
        test = parts.held_out if self.test is None else load(self.test).demonstrations
        prompts = parts.train if self.prompts is None else load(self.prompts, prompts_only=True).demonstrations
        base = () if self.base is None else load(self.base).demonstrations
        for side, rows in (("train", parts.train), ("prompts", prompts), ("base", base)):
            _check_apart(side, rows, test)
        return TaskData(parts.train, prompts, test, base)


def _check_apart(side: str, rows: tuple[Demonstration, ...], test: tuple[Demonstration, ...]) -> None:
    trained = {one.prompt_messages for one in rows}
    shared = [one for one in test if one.prompt_messages in trained]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(test)} test prompts are also in `{side}`, the first is {shared[0].source}: remove "
            "them from one of the two"
        )
