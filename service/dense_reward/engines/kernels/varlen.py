"""CUDA kernels for sequences of variable length: flash-attn's if it is installed, else torch's.

The queries of a branch are its own tokens; its keys are those of all that precedes it and its own, gathered into one
sequence. The kernels align their causal mask at the bottom right, so the first query of a branch sees its whole trunk.
Therefore one call computes a row, with sliding windows too. Gathering copies key heads only, which are few where
queries share them.

Shapes: N tokens of the row, Q queries of a call, K keys of a call, H query heads, J key heads, D their size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward.batching.prefix_trees import Range, Tree

MAX_HEAD_SIZE = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)
"""Compute capability from which the kernels run."""
KEYS = 1 << 17
"""Keys that one call gathers at most, unless one sequence has more: bounds the memory of their copies."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Cumulative lengths of consecutive sequences, from 0, int32 on the device; and the longest length, on the host.

    The kernels need `longest` as a number: computing it from a device tensor would wait for all queued kernels.
    """

    ends: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel: consecutive sequences of the row, and the tokens whose keys they attend to.

    `part`: their tokens. `key_K`: for each key its token in the row; None if the keys are `part` too.
    """

    part: slice
    queries: Ends
    keys: Ends
    key_K: Tensor | None


Varlen = tuple[Call, ...]
"""The calls that compute a row: one, unless its sequences have more than KEYS keys together."""
Heads = tuple[Tensor, Tensor, Tensor]
Kernel = Callable[[Heads, Call, float, int | None], tuple[Tensor, Tensor]]
"""Queries [Q, H, D], keys and values [K, J, D]; the call; scale; window (None: unlimited).
Returns causal attention, [Q, H, D], and its log-sum-exp, float32 [H, Q]."""


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Queries of the kernel: their tokens in the row, and those before them in their sequence."""

    own: Range
    before: tuple[Range, ...]

    @property
    def queries(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def keys(self) -> int:
        return self.queries + sum(stop - start for start, stop in self.before)


def varlen_of(trees: Sequence[Tree], device: torch.device) -> Varlen:
    """The calls for a row's trees, with their index tensors on the device."""
    return tuple(_call(sequences, device) for sequences in _groups([s for tree in trees for s in _sequences(tree)]))


def varlen_attention(
    heads_HND: Heads, row: Varlen, *, scale: float, window: int | None = None, sinks_H: Tensor | None = None
) -> Tensor | None:
    """Attention of a row, [N, H, D]; None if no installed kernel supports its dtype and head size.

    A window of W keys includes the query's own. Sinks take their share of each softmax and have no value.
    """
    kernel, size, dtype = _kernel(), heads_HND[0].shape[-1], heads_HND[0].dtype
    if kernel is None or size > MAX_HEAD_SIZE or size % 8 or dtype not in KERNEL_DTYPES:
        return None
    q, k, v = (x.transpose(0, 1) for x in heads_HND)  # views: the kernels need only the last dimension to be dense
    parts = []
    for call in row:
        keys, values = (x[call.part] if call.key_K is None else x.index_select(0, call.key_K) for x in (k, v))
        out, lse_HQ = kernel((q[call.part], keys, values), call, scale, window)
        if sinks_H is not None:
            # exp(lse) / (exp(lse) + exp(sink)), without overflow: what the sink leaves to the keys.
            out = (out * torch.sigmoid(lse_HQ - sinks_H.float()[:, None]).T[..., None]).to(dtype)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sequences(tree: Tree) -> Iterator[_Sequence]:
    yield _Sequence(tree.trunk, tree.context)
    before = (*tree.context, tree.trunk)
    for stretch in tree.branches:
        for start in range(stretch.start, stretch.start + stretch.count * stretch.length, stretch.length):
            yield _Sequence((start, start + stretch.length), before)


def _groups(sequences: Sequence[_Sequence]) -> Iterator[Sequence[_Sequence]]:
    """Consecutive sequences with at most KEYS keys together, or one that has more."""
    first = keys = 0
    for i, sequence in enumerate(sequences):
        if i > first and keys + sequence.keys > KEYS:
            yield sequences[first:i]
            first, keys = i, 0
        keys += sequence.keys
    yield sequences[first:]


def _call(sequences: Sequence[_Sequence], device: torch.device) -> Call:
    part = slice(sequences[0].own[0], sequences[-1].own[1])  # the sequences of a row follow each other without a gap
    queries, keys = [sequence.queries for sequence in sequences], [sequence.keys for sequence in sequences]
    key_K = None
    if queries != keys:
        rows = [np.arange(*range_) for sequence in sequences for range_ in (*sequence.before, sequence.own)]
        key_K = on_device(np.concatenate(rows), device)
    return Call(part, _ends(queries, device), _ends(keys, device), key_K)


@cache
def _kernel() -> Kernel | None:
    """The attention kernel for this machine's GPU; None if the GPU is too old for all of them."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_GPU:
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 - optional
    except ImportError:
        return _torch_kernel

    def flash(heads: Heads, call: Call, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        lengths = call.queries.ends, call.keys.ends, call.queries.longest, call.keys.longest
        # return_attn_probs is how flash-attn returns log-sum-exp; it does not compute probabilities for it
        options = {"softmax_scale": scale, "causal": True, "return_attn_probs": True}
        out, lse_HQ, _ = flash_attn_varlen_func(*heads, *lengths, window_size=_window(window), **options)
        return out, lse_HQ

    return flash


def _torch_kernel(heads: Heads, call: Call, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    left, right = _window(window)
    out, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
        *heads,
        call.queries.ends,
        call.keys.ends,
        call.queries.longest,
        call.keys.longest,
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse_HQ


def _window(window: int | None) -> tuple[int, int]:
    """Keys to the left of a query's own (-1: all) and to the right of it."""
    return (-1 if window is None else window - 1, 0)


def _ends(lengths: Sequence[int], device: torch.device) -> Ends:
    return Ends(on_device(np.array([0, *accumulate(lengths)], dtype=np.int32), device), max(lengths))


def on_device(array: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy of an array on a device. To a GPU from pinned memory, so that the host waits for no queued kernel."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
