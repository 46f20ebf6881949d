"""Trains two steps through TRL with given answers, alone or as one of several processes, and writes the weights.

`python trl_processes.py SFT URL FOLDER ROWS` or by torchrun; ROWS: answers of a step in each process.
"""

import sys
import zlib
from pathlib import Path

import torch
from datasets import Dataset
from dense_reward_trainer.integrations.trl import DenseReward, DenseRewardGRPOTrainer
from dense_reward_trainer.runs.processes import exits_with
from transformers import AutoTokenizer
from trl import GRPOConfig

GROUP, LONGEST = 4, 12


def main() -> int:
    sft, url, folder, rows = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    trainer = DenseRewardGRPOTrainer(
        sft,
        DenseReward(service_url=url),
        GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            max_steps=2,
            beta=0.0,
            loss_type="dr_grpo",
            learning_rate=1e-3,
            max_grad_norm=1e9,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(sft, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": f"Add {n} and {2 * n}.\n"} for n in (11, 12)]),
    )
    trainer._generate_single_turn = lambda prompts, *_, **__: (answers(prompts), None)
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "weights.pt")
    trainer.close()
    return 0


def answers(prompts: list[list[int]]) -> list[list[int]]:
    """Ids that depend on the prompt and the place in its group only."""
    return [answer(prompt, place % GROUP) for place, prompt in enumerate(prompts)]


def answer(prompt: list[int], place: int) -> list[int]:
    seed = zlib.crc32(bytes(str((prompt, place)), "ascii"))
    return [5 + (seed >> shift) % 200 for shift in range(3 + place)]


if __name__ == "__main__":
    exits_with(main)
