"""One reward for each response, for TRL's GRPOTrainer and RLOOTrainer: the sum of its token rewards.

python examples/trl_scalar.py runs/demo/checkpoints/sft http://127.0.0.1:8000 --pair reference
"""

import argparse
import random

import torch
from datasets import Dataset
from dense_reward import Client, ScoreOptions
from transformers import AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("sft", help="checkpoint to start from; its tokenizer is that of the service")
parser.add_argument("url")
parser.add_argument("--pair", help="name of the pair at the service, if it has several")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.sft, padding_side="left")
client = Client(options.url)
client.check_tokenizer(tokenizer, options.pair)  # from now on, other models are an error


def dense_sum(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    """The sum of the token rewards of each response, in nats; `mean` or `min` in its place give others."""
    rows = zip(tokenizer(text=prompts)["input_ids"], completion_ids, strict=True)
    items = [{"prompt_ids": prompt, "response_ids": [ids]} for prompt, ids in rows]
    score = ScoreOptions(model=options.pair)
    return [scored.sum for scored in client.score_items(items, options=score).results]


prompts = [f"Add {random.randint(10, 99)} and {random.randint(10, 99)}.\n" for _ in range(1000)]
trainer = RLOOTrainer(
    options.sft,
    dense_sum,
    RLOOConfig(
        output_dir="runs/trl_scalar",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        learning_rate=5e-5,
        beta=0.1,
        max_steps=options.steps,
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"prompt": prompts}),
)
trainer.train()
trainer.save_model()
