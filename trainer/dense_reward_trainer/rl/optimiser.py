"""AdamW and its learning rate, which depends only on the step. Must not know rollouts or rewards."""

import math

from torch.optim import AdamW
from transformers import PreTrainedModel

from dense_reward_trainer.configs.dpr import DprConfig


def make_optimiser(config: DprConfig, model: PreTrainedModel) -> AdamW:
    return AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def learning_rate(config: DprConfig, step: int) -> float:
    """The rate of step 1, 2, ...: linear warm-up, then the schedule; linear and cosine reach 0 after the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimiser: AdamW, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
