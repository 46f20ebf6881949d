"""Bounds the memory of feed-forward layers: they compute a limited number of rows (tokens) at a time.

Such a layer computes every row separately, so the result is the same. Its intermediate tensors are several times as
wide as its input, and without the bound would be most of the memory of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS = 2048
GPU_ROWS = 16_384
"""On a GPU memory is less scarce, and a matmul of few rows leaves it partly idle."""
_NAMES = frozenset({"mlp", "feed_forward", "ffn"})


def bound_feedforward(model: PreTrainedModel, rows: int | None = None) -> None:
    """Replace the forward of every feed-forward layer with one that computes at most `rows` rows at a time.

    None: as many as its device should.

    A layer is recognised by its name, because its classes have no base class in common.
    """
    for name, module in model.named_modules():
        # A forward on the instance is ours or another library's: never replace one of those.
        if name.rpartition(".")[2] in _NAMES and "forward" not in vars(module):
            module.forward = _in_parts(module.forward, rows)


def _in_parts(forward: Callable[..., object], limit: int | None) -> Callable[..., object]:
    def bounded(states_BLD: Tensor, *args: object, **kwargs: object) -> object:
        rows = limit or rows_at_once(cuda=states_BLD.is_cuda)
        if args or kwargs or states_BLD.ndim != 3 or states_BLD.shape[0] != 1 or states_BLD.shape[1] <= rows:
            return forward(states_BLD, *args, **kwargs)
        # Split without the batch dimension: a slice of [1, L, D] has strides that send the matmuls to a slower kernel.
        parts = [forward(part[None]) for part in torch.split(states_BLD[0], rows)]
        # Mixtures of experts can return a tuple with router logits. Those are not joined: the layer runs as a whole.
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors, dim=1) if len(tensors) == len(parts) else forward(states_BLD)

    return bounded


def rows_at_once(*, cuda: bool) -> int:
    """The most rows that a feed-forward layer computes at a time."""
    return GPU_ROWS if cuda else ROWS
