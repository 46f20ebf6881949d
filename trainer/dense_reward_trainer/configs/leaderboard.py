"""Configuration of the `leaderboard` job. Must not import torch: the command line parses before anything slow."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, SafeName
from dense_reward_trainer.configs.dpr import AUTO, Device

# The group of lm-evaluation-harness for each version of the Open LLM Leaderboard. Version 1 is six tasks with the
# shots of arXiv 2401.01335: ARC 25, TruthfulQA 0, Winogrande 5, GSM8K 5, HellaSwag 10, MMLU 5.
GROUPS: dict[int, str] = {1: "openllm", 2: "leaderboard"}


class LeaderboardConfig(JobConfig):
    """Runs lm-evaluation-harness on checkpoints: the Open LLM Leaderboard, or any of its tasks."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "policies"})

    policies: dict[SafeName, Path] = Field(min_length=1, description="Name in the table -> checkpoint folder.")
    version: Literal[1, 2] | None = Field(
        default=1,
        description="Open LLM Leaderboard. 1: ARC 25 shots, TruthfulQA 0, Winogrande 5, GSM8K 5, HellaSwag 10, MMLU 5. "
        "2: MMLU-Pro, BBH, GPQA, MATH-hard, IFEval, MuSR. null: the tasks in `tasks`.",
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="With version null: tasks or groups, as lm_eval --tasks takes them."
    )
    shots: int | None = Field(
        default=None, ge=0, description="With version null: examples before each question; null: those of the tasks."
    )
    include_path: Path | None = Field(default=None, description="Folder with tasks of your own; null: none.")
    chat_template: bool = Field(
        default=False, description="Render questions with the checkpoint's chat template; SPIN's table does not."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Precision of the weights. SPIN's table is in bfloat16."
    )
    batch_size: int | Literal["auto"] = Field(
        default="auto", description="Questions in one batch; auto: as many as fit."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Only the first so many questions of each task; null: all."
    )
    device: Device = Field(default="auto", description=AUTO)

    @model_validator(mode="after")
    def _version_or_tasks(self) -> Self:
        if (self.version is None) != bool(self.tasks):
            raise ValueError("set version, or version to null and tasks to what lm_eval shall run")
        if self.version is not None and self.shots is not None:
            raise ValueError("shots is that of tasks; a version of the leaderboard has its own: set shots to null")
        return self

    @property
    def wanted(self) -> tuple[str, ...]:
        """What lm_eval runs."""
        return self.tasks if self.version is None else (GROUPS[self.version],)
