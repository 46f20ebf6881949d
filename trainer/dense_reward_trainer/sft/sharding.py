"""The processes of a run: what is refused before training, and the whole weights of a model that they share.

DDP keeps all weights in each process. FSDP2 and DeepSpeed ZeRO keep a part in each, so all processes must take part if
one of them writes a checkpoint.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError, JobError

Weights = dict[str, torch.Tensor]
_LAUNCH = "start it as `dense-reward-train sft CONFIG --launch GPUS` prints"
_ACCELERATE_TYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_processes(config: SftConfig, arguments: TrainingArguments, variables: Mapping[str, str] = os.environ) -> None:
    """`check_launch`, and refuses to share a quantised base among processes."""
    check_launch(arguments, config.precision, _LAUNCH, variables)
    quantised = config.lora is not None and config.lora.quantise is not None
    if quantised and (fsdp_is_asked(variables) or zero_is_asked(variables)):
        raise ConfigError("lora.quantise: a quantised base cannot be sharded: use --strategy ddp")


def check_launch(
    arguments: TrainingArguments, precision: str, launch: str, variables: Mapping[str, str] = os.environ
) -> None:
    """Raises ConfigError if the processes are not what the launcher was asked for. `launch`: how to start the job.

    Each of these cases would train, but not as asked: alone, unsharded, or in another precision.
    """
    asked = int(variables.get("WORLD_SIZE", "1"))
    if asked != arguments.world_size:
        raise ConfigError(
            f"the launcher started {asked} processes, but each of them would train alone (world size "
            f"{arguments.world_size}): {launch}"
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs, but would use them by torch's DataParallel, which trl refuses: "
            f"{launch}, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )
    # accelerate 1.15 starts one process for `--cpu --num_processes 2`; it sets an address, but no world size
    if "ACCELERATE_MIXED_PRECISION" in variables and "MASTER_ADDR" in variables and "WORLD_SIZE" not in variables:
        raise ConfigError(f"accelerate was asked for several processes, but has started one: {launch}, or use torchrun")
    of_launcher = _ACCELERATE_TYPES.get(variables.get("ACCELERATE_MIXED_PRECISION", "no"), "another")
    if of_launcher not in ("float32", precision):
        raise ConfigError(
            f"the launcher asks for {of_launcher}, but precision is {precision}: make them agree, or remove "
            "mixed_precision from the launcher's configuration"
        )
    if fsdp_is_asked(variables):
        _check_fsdp(arguments, variables)


def _check_fsdp(arguments: TrainingArguments, variables: Mapping[str, str]) -> None:
    if arguments.device.type == "cpu":
        raise ConfigError(
            "FSDP is asked for, but never becomes active on a CPU (accelerate trains with plain DDP): use a GPU, or "
            "torchrun without FSDP"
        )
    if variables.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("jobs run under FSDP2 only: set fsdp_version: 2 in the fsdp_config of the launcher")
    if variables.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ConfigError(
            "every process verifies all weights of the model that it starts from: set fsdp_cpu_ram_efficient_loading: "
            "false in the fsdp_config of the launcher"
        )


def fsdp_is_asked(variables: Mapping[str, str] = os.environ) -> bool:
    return variables.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def zero_is_asked(variables: Mapping[str, str] = os.environ) -> bool:
    return variables.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


@contextmanager
def loads_whole_models() -> Iterator[None]:
    """Within the block transformers loads all weights in this process, also if DeepSpeed ZeRO-3 is asked for.

    Otherwise it would share each loaded model among the processes. All weights of the base model are verified, and the
    first process alone loads the checkpoints that it writes.
    """
    given = deepspeed._hf_deepspeed_config_weak_ref
    config = None if given is None else given()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def sharing_processes(processes: int) -> int:
    """How many processes share the weights of a model: 1 under DDP."""
    return processes if fsdp_is_asked() or zero_is_asked() else 1


def check_same_run_folder(step: int, finished: bool) -> None:
    """Raises ConfigError if the processes do not see the same state of the run. All processes must call it.

    `step`: of the newest training state. Processes that disagree would train different models.
    """
    if not torch.distributed.is_initialized():
        return
    seen: list[tuple[int, bool] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (step, finished))
    if len(set(seen)) > 1:
        raise ConfigError(
            "the processes do not see the same files in output_dir: name a folder that all machines share, or copy the "
            "run folder to each of them"
        )


def check_sharded(model: PreTrainedModel) -> None:
    """Raises JobError if FSDP is asked for, but the prepared model is not sharded."""
    if fsdp_is_asked() and not _has_shards(model):
        raise JobError("FSDP is asked for, but the model is not sharded: each GPU would hold all of it. Use FSDP2")


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A model between two steps, and what `whole_weights` returned for it."""

    model: PreTrainedModel
    weights: Weights | None


def whole_weights(model: PreTrainedModel) -> Weights | None:
    """All weights of a sharded model, on the CPU, in the type that the optimiser updates.

    All processes must call it; only the first one gets the weights, the others nothing ({}). None: the model is not
    sharded, and each process has all its weights.
    """
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters()):
        return _of_deepspeed(model)
    if not _has_shards(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: value for name, value in whole.items() if name not in tied and _is_tensor(value)}


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _has_shards(model: PreTrainedModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _of_deepspeed(model: PreTrainedModel) -> Weights:
    """DeepSpeed computes in bfloat16 and updates float32 weights; only the latter hold a small step exactly.

    Frozen weights are left out: they are those of the base model.
    """
    from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415 - an optional package

    first = torch.distributed.get_rank() == 0
    weights: Weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if whole is None:
                raise JobError(f"DeepSpeed has no whole weights of {name}: use --strategy fsdp2")
            if first:
                weights[name] = whole.detach().cpu().clone()
    return weights | ({name: b.detach().cpu().clone() for name, b in _saved_buffers(model)} if first else {})


def _saved_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
