"""Options of every job that calls the reward service. Must not import torch: the command line parses first."""

from pathlib import Path
from typing import Annotated, Self

from dense_reward.waits import CLIENT_RETRY_FOR_S, CLIENT_TIMEOUT_S
from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# None of these changes the scores, so a resumed run can change them.
SERVICE_KEYS = frozenset(
    {
        "service_url",
        "service_pair",
        "service_pairs",
        "service_key_file",
        "service_patience_s",
        "service_timeout_s",
        "service_request_tokens",
    }
)


class ServiceOptions(JobOptions):
    """How a pair of a reward service is asked."""

    service_pair: str | None = Field(default=None, description="Name of the pair at the service; null: its only pair.")
    service_key_file: Path | None = Field(
        default=None,
        description="File with the API key for the service; null: none, or the one in service_url. A key in a URL is "
        "visible in the command.",
    )
    service_patience_s: Seconds = Field(
        default=CLIENT_RETRY_FOR_S, description="Seconds that the job waits for a service that is unavailable."
    )
    service_timeout_s: Seconds = Field(
        default=CLIENT_TIMEOUT_S,
        description="Seconds that the job waits for one response before it repeats the request.",
    )
    service_request_tokens: int = Field(
        default=8192,
        ge=1,
        description="Approximate size of one request, in tokens. The service must answer it within service_timeout_s.",
    )


class ServiceJobConfig(ServiceOptions, JobConfig):
    """Base of the jobs that call a reward service. Each of them defines its own `service_url`."""


class ServicePairsConfig(ServiceJobConfig):
    """Base of the jobs that compare several references of one SFT model."""

    service_pairs: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Names of the pairs whose references are compared; they have one SFT model. null: service_pair, or "
        "all pairs of the service if that is null too. `dense-reward serve --run runs/demo` serves all references of a "
        "run.",
    )

    @property
    def pair_names(self) -> tuple[str, ...] | None:
        """The pairs to compare; None: all of the service."""
        return self.service_pairs if self.service_pair is None else (self.service_pair,)

    @model_validator(mode="after")
    def _pairs_named_once(self) -> Self:
        names = self.service_pairs or ()
        if names and self.service_pair is not None:
            raise ValueError("service_pair and service_pairs both name pairs: remove one of them")
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"service_pairs names {repeated[0]} twice: name each pair once")
        return self
