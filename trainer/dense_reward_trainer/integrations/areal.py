"""Rewards of a service in AReaL 1.0, whose rewards are one number for each response.

AReaL calls reward functions in other processes, and takes 0 for a reward that has not come within 15 s, four times.
This workflow (`workflow=` of PPOTrainer.train, examples/areal_scalar.py) asks the service itself, by ids, and waits as
long as `service_patience_s`. An error of the service ends AReaL's rollout thread, and thereby the run: AReaL would only
drop the sample, and sample others for ever.
"""

import asyncio
from typing import Any

import numpy as np
from areal.workflow.rlvr import RLVRWorkflow
from dense_reward.records import FloatArray

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.integrations.aggregated import Aggregate, aggregated
from dense_reward_trainer.integrations.connection import rewards_of
from dense_reward_trainer.rl.records import Rollout


class RunStopped(BaseException):  # not an Exception: AReaL drops a sample for each of those
    """The reward service cannot be used. AReaL's rollout thread ends with it, and the trainer then raises."""


class DenseRewardWorkflow(RLVRWorkflow):  # type: ignore[misc]
    """RLVRWorkflow whose reward is the aggregate of the token rewards of a response, in nats.

    `dense_reward`: options of DenseRewardOptions, of which only signal and service are read.
    """

    def __init__(
        self, *args: object, dense_reward: dict[str, Any] | None = None, aggregate: Aggregate = "sum", **others: object
    ) -> None:
        super().__init__(*args, reward_fn=f"{__name__}.no_reward", **others)
        self._options = DenseRewardOptions.model_validate(dense_reward or {})
        self._aggregate = aggregate
        self.reward_fn = no_reward
        self.async_reward_fn = no_reward

    async def _compute_rewards(self, resp: Any, prompt_str: str, task_data: dict[str, Any]) -> float:  # noqa: ANN401
        """Raises RunStopped if the service cannot be used, or its models are others than at first."""
        del prompt_str, task_data
        prompt, response = (np.array(ids, dtype=np.int32) for ids in (resp.input_tokens, resp.output_tokens))
        try:
            signal_T = await asyncio.to_thread(self._signal, Rollout(prompt, response, False))
            return aggregated(signal_T, self._aggregate)
        except (ConfigError, JobError) as error:
            raise RunStopped(f"the reward service cannot be used: {error}") from error

    def _signal(self, rollout: Rollout) -> FloatArray:
        options = self._options
        rewards = rewards_of(options.service_url, options, self.tokenizer, signal=options.signal)
        return rewards.score([rollout])[0].signal_T


async def no_reward(*_: object, **__: object) -> float:
    """In the place of a reward function, which this workflow does not call."""
    raise RunStopped("DenseRewardWorkflow asks the service itself")
