"""DPR inside SkyRL 0.3 and 0.4: a generator whose rewards are one for every token, and an estimator for them.

The generator takes the place of SkyRLGymGenerator in `get_generator` (examples/skyrl_dense.py). SkyRL takes lists as
token rewards; its grpo, rloo and maxrl would sum them, its `reinforce++` and `gae` and the estimator `dense_reward` do
not. Evaluation keeps the rewards of the environment. An error of the service stops the run.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dense_reward.records import FloatArray
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from torch import Tensor

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations.connection import rewards_of
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.returns import minus_other_answers, reward_to_go

ESTIMATOR = "dense_reward"
PADDING = re.compile(r"pad\d+")
"""Names that SkyRL gives to rows that it appends to fill a batch; they have no other answers and train nothing."""


class DenseRewardGenerator(SkyRLGymGenerator):  # type: ignore[misc]
    """SkyRLGymGenerator with the rewards of a service, by ids. Of `dense_reward`, only signal and service are read.

    Tokens of the environment get no reward. Raises ConfigError with step_wise_trajectories, whose estimators read one
    number of a trajectory.
    """

    def __init__(self, dense_reward: DenseRewardOptions, *args: object, **others: object) -> None:
        super().__init__(*args, **others)
        if self.generator_cfg.step_wise_trajectories:
            raise ConfigError("step_wise_trajectories sums the rewards of a trajectory: set it to false")
        self._dense_reward = dense_reward

    async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> Any:  # noqa: ANN401 - SkyRL's types
        """SkyRL's output; in training, `rewards` are lists with one number for each id of a response."""
        output = await super().generate(input_batch, disable_tqdm)
        metadata = input_batch.get("batch_metadata")
        if metadata is None or metadata.training_phase == "train":
            output["rewards"] = await asyncio.to_thread(self._token_rewards, output)
        return output

    def _token_rewards(self, output: Any) -> list[list[float]]:  # noqa: ANN401 - SkyRL's type
        options = self._dense_reward
        rewards = rewards_of(options.service_url, options, self.tokenizer, signal=options.signal)
        rows = zip(output["prompt_token_ids"], output["response_ids"], strict=True)
        rollouts = [Rollout(_ids(prompt), _ids(response), False) for prompt, response in rows]
        scored = zip(rewards.score(rollouts), output["loss_masks"], strict=True)
        return [_own(rewards.signal_T, mask).tolist() for rewards, mask in scored]


def _ids(ids: Sequence[int]) -> Any:  # noqa: ANN401 - an IdArray
    return np.array(ids, dtype=np.int32)


def _own(signal_T: FloatArray, loss_mask: Sequence[int]) -> FloatArray:
    """The signal without that of the environment's tokens. A mask of zeros only is a filter of SkyRL's, and is not
    applied: the response still counts in the baseline of the others."""
    mask_T = np.array(loss_mask, dtype=np.float32)
    return signal_T * mask_T if mask_T.any() else signal_T


@register_advantage_estimator(ESTIMATOR)  # type: ignore[untyped-decorator]
def token_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[str], gamma: float = 1.0, **_: object
) -> tuple[Tensor, Tensor]:
    """Reward-to-go minus its mean over the other answers to the prompt, position by position; and the reward-to-go.

    As in the job dpr with `baseline: leave_one_out`; all [B, T]. `index`: the prompt of each row. With SkyRL's
    `use_kl_in_reward`, the rewards already have the KL penalty. Raises ConfigError if a prompt has one answer.
    """
    prompts = ["padding" if PADDING.fullmatch(str(prompt)) else str(prompt) for prompt in index]
    real = [row for row, prompt in enumerate(prompts) if prompt != "padding"]
    counts = Counter(prompts[row] for row in real)
    if 1 in counts.values():
        raise ConfigError(
            "a prompt has one answer, so there is nothing to compare it with: set n_samples_per_prompt above 1"
        )
    # SkyRL aligns responses at their ends; answers are compared from their first token on.
    order_BT = torch.argsort((response_mask > 0).int(), dim=1, descending=True, stable=True)
    with torch.no_grad():
        mask_BT = response_mask.gather(1, order_BT)
        return_BT = reward_to_go(token_level_rewards.gather(1, order_BT), mask_BT, gamma)
        advantage_BT = torch.zeros_like(return_BT)
        advantage_BT[real] = minus_other_answers(return_BT[real], [prompts[row] for row in real])
        advantage_BT = advantage_BT * mask_BT
        found = [torch.zeros_like(one).scatter(1, order_BT, one).float() for one in (advantage_BT, return_BT)]
    return found[0], found[1]
