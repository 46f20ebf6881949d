"""One reward for each response in AReaL 1.0, from a running service. Not run yet: it needs GPUs.

python examples/areal_scalar.py --config CONFIG.yaml   # AReaL's configuration of a GRPO run
"""

import os
import sys

from areal import PPOTrainer
from areal.api.cli_args import GRPOConfig, load_expr_config
from areal.dataset import get_custom_dataset
from areal.utils.hf_utils import load_hf_tokenizer

config, _ = load_expr_config(sys.argv[1:], GRPOConfig)
tokenizer = load_hf_tokenizer(config.tokenizer_path)
rows = get_custom_dataset(split="train", dataset_config=config.train_dataset, tokenizer=tokenizer)
with PPOTrainer(config, train_dataset=rows) as trainer:
    trainer.train(
        workflow="dense_reward_trainer.integrations.areal.DenseRewardWorkflow",
        workflow_kwargs={
            "gconfig": config.gconfig,
            "tokenizer": config.tokenizer_path,
            "dense_reward": {"service_url": os.environ.get("DENSE_REWARD_URL", "http://127.0.0.1:8000")},
            "aggregate": "sum",
        },
    )
