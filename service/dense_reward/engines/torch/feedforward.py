"""Keeps the widest tensors of a forward short: feed-forward layers see so many rows at a time.

Each row goes through such a layer by itself, so the result is the same; what it needs in between is several times as
wide as what goes in, and would be most of the memory of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS = 2048
_NAMES = frozenset({"mlp", "feed_forward", "ffn"})


def bound_feedforward(model: PreTrainedModel, rows: int = ROWS) -> None:
    """Replaces the forward of every feed-forward layer by one that takes at most `rows` at a time."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _NAMES and "forward" not in vars(module):
            module.forward = _in_parts(module.forward, rows)


def _in_parts(forward: Callable[..., object], rows: int) -> Callable[..., object]:
    def bounded(states_BLD: Tensor, *args: object, **kwargs: object) -> object:
        if args or kwargs or states_BLD.ndim != 3 or states_BLD.shape[0] != 1 or states_BLD.shape[1] <= rows:
            return forward(states_BLD, *args, **kwargs)
        # not a slice of three dimensions: its strides would send the matmuls to a slower kernel
        parts = [forward(part[None]) for part in torch.split(states_BLD[0], rows)]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors, dim=1) if len(tensors) == len(parts) else forward(states_BLD)

    return bounded
