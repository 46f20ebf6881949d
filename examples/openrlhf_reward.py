"""A reward function for OpenRLHF, of text: `--reward.remote_url examples/openrlhf_reward.py`.

The service answers the same by itself: `--reward.remote_url http://127.0.0.1:8000/get_reward?aggregate=sum`.
"""

import os

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.integrations.openrlhf import TextRewards

URL = os.environ.get("DENSE_REWARD_URL", "http://127.0.0.1:8000")
SFT = os.environ.get("DENSE_REWARD_SFT", "runs/demo/checkpoints/sft")
rewards = TextRewards(SFT, DenseRewardOptions(service_url=URL), aggregate="sum")


def reward_func(queries: list[str], prompts: list[str], labels: list[object]) -> dict[str, list[float]]:
    """The sum of the token rewards of each response, in nats."""
    del labels
    return dict(rewards(queries, prompts))
