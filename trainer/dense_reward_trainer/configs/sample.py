"""Configuration of the `sample` job. Must not import torch: the command line parses before any slow import."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, Seed
from dense_reward_trainer.configs.dpr import AUTO, PRECISION, THREADS, Device, Precision
from dense_reward_trainer.configs.evaluate import PolicyOptions


class SampleConfig(JobConfig):
    """Responses of any policy to any prompts, tilted and extrapolated policies included, as a file."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "threads"})

    policy: PolicyOptions = Field(
        description="The policy: a checkpoint folder, or the keys of a policy as in evaluate."
    )
    prompts: Path = Field(description="File of prompts or of demonstrations, whose responses are ignored.")
    limit: int | None = Field(default=None, ge=1, description="Use only the first `limit` prompts; null: all.")
    samples_per_prompt: int = Field(default=1, ge=1, description="Responses sampled for each prompt.")
    greedy: bool = Field(default=False, description="Take the likeliest token each time instead of sampling.")
    max_new_tokens: int = Field(
        default=256, ge=1, description="Maximum response length, in tokens. Longer responses are cut off."
    )
    batch_size: int = Field(default=64, ge=1, description="Responses generated in one batch.")
    seed: Seed = Field(default=0, description="Seed of the samples.")
    device: Device = Field(default="auto", description=AUTO)
    precision: Precision = Field(default="float32", description=PRECISION)
    threads: int | None = Field(default=None, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _every_sample(self) -> Self:
        if self.policy.choose is not None:
            raise ValueError("sample writes every sample, and evaluate chooses among them: remove policy.choose")
        if self.greedy and self.samples_per_prompt > 1:
            raise ValueError("greedy responses to one prompt are all the same: set samples_per_prompt to 1")
        return self
