"""Rewards by ids in OpenRLHF, of which an error stops the run: `--train.agent_func_path examples/openrlhf_agent.py`.

A whole training run needs GPUs and was not run; `make test-frameworks` drives OpenRLHF's executor.
"""

import os

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.integrations.openrlhf import DenseRewardExecutor


class AgentExecutor(DenseRewardExecutor):
    """One answer to each prompt, rewarded by the sum of its token rewards, in nats."""

    dense_reward = DenseRewardOptions(service_url=os.environ.get("DENSE_REWARD_URL", "http://127.0.0.1:8000"))
    aggregate = "sum"
