"""A model that computes in float32 although its weights stay as they are on disk, mapped and not copied.

A layer's weights are float32 only while the layer runs, so a checkpoint of 16-bit weights is measured in a fraction of
the memory that it takes in float32. The numbers are the same, bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dense_reward.engines.torch.model import TorchModel, load_model
from dense_reward.engines.torch.weights import weight_folders
from dense_reward.engines.weight_files import weights_of
from dense_reward.manifest import Manifest

SHORT = {"BF16": "bfloat16", "F16": "float16"}
"""16-bit dtypes, as safetensors writes them."""
_Owned = tuple[nn.Module, str]


def load_float32(folder: Path, manifest: Manifest, *, device: str) -> TorchModel:
    """The checkpoint's model in float32, by little memory where that is exact. Raises CheckpointError."""
    files, base = weight_folders(folder, manifest)
    stored = set(weights_of(files).values()) if files == base and device == "cpu" else set()
    if len(stored) == 1 and (short := SHORT.get(next(iter(stored)))) is not None:
        model = load_model(folder, manifest, dtype=short, device=device)
        if _computes_in_float32(model.transformers_model):
            return model
    return load_model(folder, manifest, dtype="float32", device=device)


def _computes_in_float32(model: PreTrainedModel) -> bool:
    """Make a model of 16-bit weights compute in float32; False, and nothing done, if it would not be exact.

    Buffers that are not stored were computed in 16 bits, as Gemma's factor of its embeddings.
    """
    modules = list(model.modules())
    computed = [module._buffers[name] for module in modules for name in module._non_persistent_buffers_set]
    if any(_is_short(buffer) for buffer in computed):
        return False
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_short(buffer):
                module._buffers[name] = buffer.float()
    for layer in _layers(model):
        _widen_while_running(layer)
    return True


def _layers(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """The modules that are widened together: those of a decoder layer, which can read each other's weights; or one."""
    kinds = set(model._no_split_modules or ())
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside:
            layer = list(module.modules()) if type(module).__name__ in kinds else [module]
            inside.update(layer)
            yield layer


def _widen_while_running(layer: list[nn.Module]) -> None:
    owned: list[_Owned] = [
        (module, name) for module in layer for name, weight in module._parameters.items() if _is_short(weight)
    ]
    kept: list[tuple[_Owned, nn.Parameter | None]] = []

    def widen(*_: object) -> None:
        for module, name in owned:
            weight = module._parameters[name]
            kept.append(((module, name), weight))
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)

    def restore(*_: object) -> None:
        while kept:
            (module, name), weight = kept.pop()
            module._parameters[name] = weight

    if owned:
        layer[0].register_forward_pre_hook(widen)
        layer[0].register_forward_hook(restore, always_call=True)


def _is_short(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.element_size() == 2
