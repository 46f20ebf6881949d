"""Configuration of the `benchmark` job. Must not import torch: the command line parses before anything slow."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import SafeName, Seed
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServicePairsConfig
from dense_reward_trainer.configs.signals import WINDOW_TOKENS


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
