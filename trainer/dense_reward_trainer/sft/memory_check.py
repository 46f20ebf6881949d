"""Compares the estimated memory of a run with what its devices have, before the first step."""

import math
import os

import torch
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report
from transformers import PreTrainedModel

from dense_reward_trainer.configs.sft import LoraOptions, SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.sft.memory import (
    BFLOAT16,
    FLOAT32,
    QUANTISED_BYTES,
    ModelSizes,
    StepShape,
    advice,
    estimate,
    in_words,
    sizes_of,
    which_fits,
)
from dense_reward_trainer.sft.training_rows import TrainingRows

_NAMES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_hidden_layers",
    "vocab_size",
)


def check_memory(
    config: SftConfig, model: PreTrainedModel, rows: TrainingRows, report: Report, *, processes: int, sharing: int
) -> None:
    """`model`: before it gets adapters, and before it is moved to a GPU. `sharing`: processes that share its weights.

    Reports what each device needs. Raises ConfigError if a GPU has less free, unless `allow_memory` is set.

    On a CPU, where memory is shared with other programs, it warns.
    """
    sizes = model_sizes(model, config.lora)
    device = chosen_device(config.device)
    step = step_shape(config, rows, processes, sharing)
    needs, free = estimate(sizes, step), free_bytes(device)
    place = "GPU" if device.startswith("cuda") else "process"
    report(f"memory: needs {in_words(needs.peak)} per {place} ({needs.words()}); {in_words(free)} free")
    if needs.peak <= free:
        return
    fits = which_fits(advice(sizes, step, config.batch_size, processes), free)
    cure = f"this would fit: {fits.option}, {in_words(fits.needs.peak)}" if fits else "no option of sft would fit"
    text = f"needs {in_words(needs.peak)} per {place}, but {in_words(free)} are free; {cure}"
    if place == "GPU" and not config.allow_memory:
        raise ConfigError(f"{text}. The estimate is within about a tenth; to try anyway, set allow_memory=true")
    report(f"warning: {text}")


def model_sizes(model: PreTrainedModel, lora: LoraOptions | None) -> ModelSizes:
    """Sizes of a model as it will be trained."""
    config = model.config.get_text_config()
    values = {name: value for name in _NAMES if isinstance(value := getattr(config, name, None), int)}
    whole = sum(map(_numel, model.parameters()))
    if lora is None:
        return sizes_of(values, trained=whole, frozen=0)
    return sizes_of(values, trained=_adapter_parameters(model, lora), frozen=whole)


def _adapter_parameters(model: PreTrainedModel, lora: LoraOptions) -> int:
    """Each adapted layer gets a matrix from its inputs to the rank, and one from the rank to its outputs."""
    output = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    ]
    if not isinstance(lora.target_modules, str):
        linear = [(name, module) for name, module in linear if name.rpartition(".")[2] in lora.target_modules]
    return lora.r * sum(module.in_features + module.out_features for _, module in linear)


def _numel(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; bitsandbytes stores two of 4 bits in each of its bytes."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def step_shape(config: SftConfig, rows: TrainingRows, processes: int, sharing: int) -> StepShape:
    """The widest step: rows as long as the longest one."""
    labels = rows.dataset["labels"]
    learnt = max(sum(label >= 0 for label in row) for row in labels)
    frozen: float = BFLOAT16 if config.precision == "bfloat16" else FLOAT32
    if config.lora is not None and config.lora.quantise is not None:
        frozen = QUANTISED_BYTES
    return StepShape(
        tokens=config.batch_size * rows.longest_tokens,
        learnt=config.batch_size * learnt,
        accumulation=config.gradient_accumulation,
        bfloat16=config.precision == "bfloat16",
        checkpointing=config.gradient_checkpointing,
        frozen_bytes=frozen,
        sharing=sharing,
        replicas=processes > sharing,
        cuda=chosen_device(config.device).startswith("cuda"),
    )


def free_bytes(device: str) -> int:
    """Memory that is free now: of this process's GPU, or of the machine."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()  # what this process holds counts too
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return math.floor(pages * size)
