"""One number for each response, for programs whose rewards are scalars: sum, mean or minimum of its token rewards."""

from typing import Literal

from dense_reward.records import FloatArray
from dense_reward.reward import summarise

from dense_reward_trainer.errors import JobError

Aggregate = Literal["sum", "mean", "min"]


def aggregated(signal_T: FloatArray, aggregate: Aggregate) -> float:
    """Raises JobError for the mean or the minimum of nothing."""
    found: float | None = getattr(summarise(signal_T), aggregate)
    if found is None:
        raise JobError(f"an empty response has no {aggregate} of its rewards: set aggregate to sum")
    return found
