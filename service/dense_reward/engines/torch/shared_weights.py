"""Weights that are bitwise equal in several served models are held once: embeddings, frozen layers, an adapter's base.

Only a model that was just loaded changes: its tensors become views of the other models' storage, which is freed with
the last of them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hold_once(weights: Weights, others: Sequence[Weights]) -> int:
    """Give the storage of others' weights to those of the same name, device, dtype, shape and bits.

    Returns the bytes that are no longer needed. Call it before CUDA graphs record the addresses of `weights`.
    """
    held = [tensor for other in others for tensor in other.values()]
    before = stored_bytes([*weights.values(), *held])
    for name, weight in weights.items():
        for other in others:
            if name in other and same_bits(weight, other[name]):
                weight.data = other[name].data
                break
    return before - stored_bytes([*weights.values(), *held])


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what several of them share counts once."""
    return sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are on one device, in one dtype and layout, with the same bits (-0.0 is not 0.0)."""
    if (one.device, one.dtype, one.shape, one.stride()) != (other.device, other.dtype, other.shape, other.stride()):
        return False
    if one.data_ptr() == other.data_ptr():
        return True
    kind = _INTEGERS.get(one.itemsize)
    return kind is not None and torch.equal(one.detach().view(kind), other.detach().view(kind))
