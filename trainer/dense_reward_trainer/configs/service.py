"""How a job reaches the reward service: options of every job that asks it. Must not import torch."""

from typing import Annotated

from pydantic import Field

from dense_reward_trainer.configs.base import JobConfig

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# None of these changes what the service answers, so a resumed run may have others.
SERVICE_KEYS = frozenset(
    {"service_url", "service_pair", "service_patience_s", "service_timeout_s", "service_request_tokens"}
)


class ServiceJobConfig(JobConfig):
    """A job that asks a reward service; each job states its own `service_url`."""

    service_pair: str | None = Field(default=None, description="Name of the pair there; null: the only one.")
    service_patience_s: Seconds = Field(default=300.0, description="How long a service that is away is waited for.")
    service_timeout_s: Seconds = Field(
        default=120.0, description="How long one answer may take before it is asked for again."
    )
    service_request_tokens: int = Field(
        default=8192,
        ge=1,
        description="Tokens of one request, about: its answer must be there within service_timeout_s on the service's "
        "device.",
    )
