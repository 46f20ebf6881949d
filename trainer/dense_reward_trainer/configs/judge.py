"""Configuration of the `judge` job. Must not import torch: the command line parses before any slow import."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, SafeName, Seed


class JudgeOptions(JobOptions):
    """A judge behind a URL that speaks OpenAI's chat completions, such as vLLM, SGLang or a provider."""

    url: str = Field(pattern=r"^https?://", description="Up to and with /v1, such as http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="The model's name at the judge.")
    api_key_variable: str | None = Field(
        default=None, description="Name of the environment variable that holds the key; null: no key is sent."
    )
    max_tokens: int = Field(default=2048, ge=1, description="Longest reply. AlpacaEval 2 takes 1, Arena-Hard 16000.")
    temperature: float = Field(default=0.0, ge=0.0, description="0: the likeliest reply. AlpacaEval 2 takes 1.")
    input_price: float | None = Field(default=None, ge=0.0, description="Price of a million prompt tokens.")
    output_price: float | None = Field(default=None, ge=0.0, description="Price of a million tokens of replies.")
    concurrency: int = Field(default=8, ge=1, description="Requests on their way at the same time.")
    retries: int = Field(default=6, ge=0, description="Retries of a request after HTTP 429, 5xx or a lost connection.")
    timeout_s: float = Field(default=600.0, gt=0.0, description="Seconds to wait for one reply.")


class JudgeConfig(JobConfig):
    """Win rates of policies against a baseline, by the verdicts of one or two judges, in both orders."""

    # A reply is kept under the hash of its request, so it stays right whatever else changes.
    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "answers", "baseline", "judges", "training_prompts", "estimate_only"}
    )

    benchmark: Literal["alpaca_eval", "arena_hard", "mt_bench", "lima"] = Field(
        description="Whose questions, prompts for the judge and file formats."
    )
    questions: Path = Field(description="The benchmark's own file of questions.")
    answers: dict[SafeName, Path] = Field(
        default={},
        description="Policy -> its answers: samples.jsonl of `sample`, or a file in the benchmark's format. Policies "
        "can be added later. Without any, only the prompts are written.",
    )
    baseline: SafeName = Field(default="sft", description="The policy that the others are compared with.")
    judges: dict[SafeName, JudgeOptions] = Field(
        min_length=1, max_length=2, description="Name -> judge. With two, their agreement is reported."
    )
    training_prompts: Path | None = Field(
        default=None, description="The training data, to count test prompts that occur in it; null: not checked."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first `limit` questions; null: all.")
    estimate_only: bool = Field(default=False, description="Only estimate tokens and cost; ask nothing.")
    seed: Seed = Field(default=0, description="Seed of the bootstrap.")

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.answers and self.baseline not in self.answers:
            raise ValueError(f"answers has no {self.baseline}, which is the baseline: add it, or name another baseline")
        if len(self.answers) == 1:
            raise ValueError("answers has only the baseline: add a policy to compare with it")
        return self
