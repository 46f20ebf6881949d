"""DPR in TRL: an advantage for every token. Needs a served pair, such as `dense-reward serve --run runs/demo`.

    python examples/trl_dense.py runs/demo/checkpoints/sft http://127.0.0.1:8000 --pair reference

Several GPUs: `accelerate launch examples/trl_dense.py ...`; vLLM for the samples: use_vllm=True in GRPOConfig.
"""

import argparse
import random

import torch
from datasets import Dataset
from dense_reward_trainer.integrations.trl import DenseReward, DenseRewardGRPOTrainer
from transformers import AutoTokenizer
from trl import GRPOConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("sft", help="checkpoint to start from; its tokenizer is that of the service")
parser.add_argument("url")
parser.add_argument("--pair", help="name of the pair at the service, if it has several")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

prompts = [f"Add {random.randint(10, 99)} and {random.randint(10, 99)}.\n" for _ in range(1000)]
trainer = DenseRewardGRPOTrainer(
    options.sft,
    DenseReward(service_url=options.url, service_pair=options.pair, returns="reward_to_go", kl_coefficient=0.1),
    GRPOConfig(
        output_dir="runs/trl_dense",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        learning_rate=5e-5,
        loss_type="dr_grpo",
        max_steps=options.steps,
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    processing_class=AutoTokenizer.from_pretrained(options.sft, padding_side="left"),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
)
trainer.train()
trainer.save_model()
