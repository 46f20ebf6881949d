"""The configuration of the credit job. Must not import torch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from dense_reward_trainer.configs.dpr import Device
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServiceJobConfig
from dense_reward_trainer.data.corruption import Kind
from dense_reward_trainer.data.sources import DataSource


class CreditConfig(ServiceJobConfig):
    """Error localisation, and ranking of right against wrong answers, through a running service."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "device"}

    service_url: str = Field(default="http://127.0.0.1:8000", description="Where the pair is served.")
    data: DataSource = Field(description="Right answers that the pair was not trained on, such as held_out.jsonl.")
    corruptions: tuple[Kind, ...] = Field(
        default=("digit",),
        min_length=1,
        description="Kinds of planted errors: one digit; one number by another with as many digits; one word, or one "
        "line but the last, by another of the data as long. The answer keeps the number of its tokens.",
    )
    against: Literal["tokens", "digit_tokens"] = Field(
        default="tokens", description="Which other tokens of its answer the planted error must stand out from."
    )
    answers: int = Field(default=200, ge=1, description="Answers that get an error, for each kind.")
    solutions: Path | None = Field(
        default=None,
        description="File of ProcessBench or PRM800K: is the first wrong step lower than those before? null: none.",
    )
    policy: Path | None = Field(
        default=None, description="Checkpoint whose sampled answers are ranked, right against wrong; null: none."
    )
    samples: int = Field(default=1000, ge=1, description="Answers sampled at temperature 1, one to a prompt at first.")
    max_new_tokens: int = Field(default=256, ge=1, description="Longer samples are cut off and count as wrong.")
    device: Device = Field(default="cpu", description="Where the policy samples.")
    seed: int = Field(default=0, ge=0, description="Of the errors, the samples and the bootstrap.")
