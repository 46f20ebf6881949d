"""Compares the estimated memory of a run with what its devices have, before the first step."""

import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
from dense_reward.engines.torch import memory as memory_of_cpu
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report
from peft import get_peft_model
from transformers import PreTrainedModel

from dense_reward_trainer.configs.sft import LoraOptions, SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.sft.arguments import lora_config
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

_NEEDED = {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}


def check_memory(
    config: SftConfig, model: PreTrainedModel, rows: TrainingRows, report: Report, *, processes: int, sharing: int
) -> None:
    """`model`: before it gets adapters, and before it is moved to a GPU. `sharing`: processes that share its weights.

    Reports what each device needs. Raises ConfigError if a GPU has less free, unless `allow_memory` is set.

    On a CPU, where memory is shared with other programs, it warns.
    """
    sizes = model_sizes(model, config.lora)
    if sizes is None:
        report(f"memory: no estimate, because {model.config.model_type} has no attention heads: watch the first steps")
        return
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


def model_sizes(model: PreTrainedModel, lora: LoraOptions | None) -> ModelSizes | None:
    """Sizes of a model as it will be trained; None if it is not a decoder of the kind that `estimate` counts."""
    config = model.config.get_text_config()
    values = {name: value for name in _NAMES if isinstance(value := getattr(config, name, None), int)}
    trained = None if lora is None else adapter_parameters(lambda: type(model)(deepcopy(model.config)), lora)
    if not values.keys() >= _NEEDED:
        return None
    whole = sum(map(_numel, model.parameters()))
    return (
        sizes_of(values, trained=whole, frozen=0)
        if trained is None
        else sizes_of(values, trained=trained, frozen=whole)
    )


def adapter_parameters(make: Callable[[], PreTrainedModel], lora: LoraOptions) -> int:
    """The parameters that peft adds, counted on a model that `make` makes, without memory for it.

    Raises ConfigError if peft cannot adapt the layers that are named.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training gives them again
        try:
            adapted = get_peft_model(make(), lora_config(lora))
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"lora.target_modules: peft cannot adapt these layers: {reason}") from None
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


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
    """Memory that this process can take now: of its GPU, or of the machine, or of its container if that has a limit."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()  # what this process holds counts too
    return memory_of_cpu.free_bytes()
