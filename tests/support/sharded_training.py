"""One of several processes that train a small model sharded by `fully_shard` on the CPU, and write a milestone.

`torchrun --nproc_per_node 2 sharded_training.py FOLDER`. trl and accelerate never shard on a CPU, so this loop is ours;
the gathering, the callback and the writer are those of the sft job. FOLDER/plain holds what one process alone writes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.sources import load
from dense_reward_trainer.data.tokenised import encode_demonstrations
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.processes import exits_with
from dense_reward_trainer.sft.checkpoint_writer import CheckpointWriter, SaveMilestones, shared_facts
from dense_reward_trainer.sft.initial_model import initial_model_of
from dense_reward_trainer.sft.milestones import MilestoneSchedule
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

STEPS = 3


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    train(folder / "sharded", sharded=True)
    if torch.distributed.get_rank() == 0:
        train(folder / "plain", sharded=False)
    torch.distributed.barrier()
    return 0


def train(folder: Path, *, sharded: bool) -> None:
    """Three steps of AdamW on the same batch, a milestone after the second, then the sft checkpoint."""
    config = load_config(SftConfig, config_path("arithmetic_sft_tiny"), [f"output_dir={folder}"])
    demonstrations = load(config.data).demonstrations[:8]
    initial = initial_model_of(config, demonstrations, {})
    encoded = encode_demonstrations(
        demonstrations, initial.encoder, every_turn=False, limit_tokens=64, skip_bad=False
    ).rows
    model = initial.model.train()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule, writer = MilestoneSchedule(8, 8, STEPS), None
    if not sharded or torch.distributed.get_rank() == 0:
        facts = shared_facts(config, "sft-1", "0" * 64, initial)
        writer = CheckpointWriter(folder / "checkpoints", initial, schedule, facts, encoded)
    milestones = SaveMilestones(lambda: model, schedule, {"reference": 2}, writer, lambda _: None)
    run_steps(model, [(row.input_ids, row.labels) for row in encoded], optimiser, milestones)


def run_steps(
    model: PreTrainedModel,
    rows: list[tuple[list[int], list[int]]],
    optimiser: torch.optim.Optimizer,
    milestones: SaveMilestones,
) -> None:
    rate = cast(LRScheduler, SimpleNamespace(get_last_lr=lambda: [1e-2]))
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        for ids, labels in rows:
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.div(len(rows)).backward()
        optimiser.step()
        state = TrainerState(global_step=step, max_steps=STEPS)
        milestones.on_step_end(TrainingArguments("unused", use_cpu=True), state, TrainerControl(), rate)
    milestones.write_sft(STEPS, rate)


if __name__ == "__main__":
    exits_with(main)
