"""Options of every job that calls the reward service. Must not import torch: the command line parses first."""

from typing import Annotated

from pydantic import Field

from dense_reward_trainer.configs.base import JobConfig

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# None of these changes the scores, so a resumed run can change them.
SERVICE_KEYS = frozenset(
    {"service_url", "service_pair", "service_patience_s", "service_timeout_s", "service_request_tokens"}
)


class ServiceJobConfig(JobConfig):
    """Base of the jobs that call a reward service. Each of them defines its own `service_url`."""

    service_pair: str | None = Field(default=None, description="Name of the pair at the service; null: its only pair.")
    service_patience_s: Seconds = Field(
        default=300.0, description="Seconds that the job waits for a service that is unavailable."
    )
    service_timeout_s: Seconds = Field(
        default=120.0, description="Seconds that the job waits for one response before it repeats the request."
    )
    service_request_tokens: int = Field(
        default=8192,
        ge=1,
        description="Approximate size of one request, in tokens. The service must answer it within service_timeout_s.",
    )
