"""Writes a task's data as files, which jobs read like any user's files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.records import DataError
from dense_reward_trainer.tasks.files import FilesTask
from dense_reward_trainer.tasks.mixed_demonstrators import MixedDemonstratorsTask
from dense_reward_trainer.tasks.nuisance_entropy import NuisanceEntropyTask
from dense_reward_trainer.tasks.records import Task, TaskData
from dense_reward_trainer.tasks.worked import WorkedTask

AnyTask = Annotated[WorkedTask | MixedDemonstratorsTask | NuisanceEntropyTask | FilesTask, Field(discriminator="name")]


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """The files of a task in a folder; `base` and `labelled` are written only if there are such data."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base.jsonl"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def test(self) -> Path:
        return self.folder / "test.jsonl"

    @property
    def labelled(self) -> Path:
        return self.folder / "labelled.jsonl"


def write_task(task: Task, seed: int, folder: Path, labelled: int = 0) -> TaskData:
    """Writes the files of a task with a seed, and returns what they hold.

    `labelled`: so many of the last test problems are written to a file of their own instead. Raises DataError.
    """
    data, files = task.data(seed), TaskFiles(folder)
    tested = len(data.test) - labelled
    if tested < 1:
        raise DataError(f"labelled is {labelled}, but there are only {len(data.test)} test problems: lower it")
    shared = {one.prompt_messages for one in data.test[:tested]}.intersection(
        one.prompt_messages for one in data.test[tested:]
    )
    if shared:
        raise DataError(
            f"{len(shared)} prompts of the last {labelled} test problems, which only the preview uses, are also among "
            "the others: remove repeated test prompts, or set labelled to 0"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in (
        (files.base, data.base),
        (files.train, data.train),
        (files.prompts, data.prompts),
        (files.test, data.test[:tested]),
        (files.labelled, data.test[tested:]),
    ):
        if rows:
            write_held_out(path, rows)
    return data
