"""Configuration of the jobs `benchmark` and `leaderboard`. Must not import torch: the command line parses first."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, SafeName, Seed
from dense_reward_trainer.configs.dpr import AUTO, Device
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServicePairsConfig
from dense_reward_trainer.configs.signals import WINDOW_TOKENS

# The group of lm-evaluation-harness for each version of the Open LLM Leaderboard. Version 1 is six tasks with the
# shots of arXiv 2401.01335: ARC 25, TruthfulQA 0, Winogrande 5, GSM8K 5, HellaSwag 10, MMLU 5.
GROUPS: dict[int, str] = {1: "openllm", 2: "leaderboard"}


class BenchmarkConfig(ServicePairsConfig):
    """Scores the responses of process-reward benchmarks with the pairs of a service, and computes their own metrics."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir"}

    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )
    first_errors: dict[SafeName, Path] = Field(
        default={},
        description="Name of a split -> its file of ProcessBench or PRM800K: which step is the first wrong one?",
    )
    threshold_split: str | None = Field(
        default=None,
        description="The split of first_errors on which thresholds are chosen; ProcessBench's paper takes gsm8k. null: "
        "each half of a file's problems is judged with the threshold that is best on the other half.",
    )
    prm_bench: Path | None = Field(
        default=None,
        description="File of PRMBench, or a folder of such files: which steps are wrong? null: not measured.",
    )
    reward_bench_2: Path | None = Field(
        default=None,
        description="File of RewardBench 2: is the right one of four responses the best? null: not measured.",
    )
    step_separator: str = Field(
        default="\n\n", description="What stands between two steps of a response that is given as steps."
    )
    limit: int | None = Field(default=None, ge=1, description="Read the first so many rows of a file; null: all.")
    window_tokens: int = Field(
        default=WINDOW_TOKENS, ge=1, description="Length of the window of the aggregate window_min, in tokens."
    )
    seed: Seed = Field(default=0, description="Seed of the bootstrap, and of the halves of a file.")

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if not self.first_errors and self.prm_bench is None and self.reward_bench_2 is None:
            raise ValueError("nothing to measure: set first_errors, prm_bench or reward_bench_2")
        if self.threshold_split is not None and self.threshold_split not in self.first_errors:
            known = ", ".join(self.first_errors) or "none"
            raise ValueError(f"threshold_split {self.threshold_split} is no split of first_errors ({known})")
        if self.threshold_split is not None and len(self.first_errors) == 1:
            raise ValueError(
                "threshold_split is the only split, and would be judged by its own threshold: set it to null"
            )
        return self


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
