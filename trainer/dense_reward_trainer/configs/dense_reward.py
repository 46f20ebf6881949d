"""Options of the dense reward inside a program that samples and trains by itself. Must not import torch."""

from typing import Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.advantages import AdvantageOptions
from dense_reward_trainer.configs.service import ServiceOptions


class DenseRewardOptions(AdvantageOptions, ServiceOptions):
    """Where token rewards come from, and how they become advantages. The size of groups is that of the samples."""

    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )

    @model_validator(mode="after")
    def _what_a_loss_of_the_samples_can_do(self) -> Self:
        if self.candidates:
            raise ValueError("candidates: this program trains on the sampled ids only: set candidates to 0")
        if self.kl_penalty != "reward":
            raise ValueError(
                "kl_penalty: a KL in the loss is this program's own: use that, and set kl_coefficient to 0"
            )
        if "group_size" in self.model_fields_set:
            raise ValueError("group_size is that of the samples: leave it out")
        return self
