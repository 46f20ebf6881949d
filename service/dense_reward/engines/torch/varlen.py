"""CUDA kernels for sequences of variable length: flash-attn's if it is installed, else torch's.

A row takes two calls: first every trunk and every branch causally to itself, then the branches of each tree to their
trunk. The two results are merged by their log-sum-exp. The keys of a trunk are not copied for its branches.

Shapes: N tokens of the row, H heads, D their size, M tokens of branches, L tokens of trunks that have branches.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward.batching.packing import Tree

MAX_HEAD_SIZE = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Ends:
    """Cumulative lengths of consecutive sequences, from 0, int32 on the device; and the longest length, on the host.

    The kernels need `longest` as a number: computing it from a device tensor would wait for all queued kernels.
    """

    ends: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Varlen:
    """The index tensors of a row. The last four are None if no tree has branches.

    `segments`: every trunk and every branch. `branches`: all branches of one tree are one sequence of queries, whose
    keys are the sequence of `trunks` at the same index. `branch_rows_M`, `trunk_rows_L`: their tokens in the row.
    """

    segments: Ends
    branch_rows_M: Tensor | None
    branches: Ends | None
    trunk_rows_L: Tensor | None
    trunks: Ends | None


Heads = tuple[Tensor, Tensor, Tensor]
Kernel = Callable[[Heads, tuple[Ends, Ends], float, bool], tuple[Tensor, Tensor]]
"""Queries, keys and values [tokens, heads, D]; ends of queries and of keys; scale; causal.
Returns the result and its log-sum-exp, float32 [tokens, H]."""


def varlen_of(trees: Sequence[Tree], device: torch.device) -> Varlen:
    """The index tensors of a row's trees, on the device."""
    segments = [n for t in trees for n in (t.tokens, *(s.length for s in t.branches for _ in range(s.count)))]
    branched = [tree for tree in trees if tree.branches]
    if not branched:
        return Varlen(_ends(segments, device), None, None, None, None)
    blocks = [sum(s.count * s.length for s in tree.branches) for tree in branched]
    trunks = [np.arange(tree.start, tree.start + tree.tokens) for tree in branched]
    branches = [  # a tree's branches follow its trunk without a gap
        np.arange(tree.start + tree.tokens, tree.start + tree.tokens + block)
        for tree, block in zip(branched, blocks, strict=True)
    ]
    return Varlen(
        _ends(segments, device),
        _index(branches, device),
        _ends(blocks, device),
        _index(trunks, device),
        _ends([tree.tokens for tree in branched], device),
    )


def varlen_attention(heads_HND: Heads, row: Varlen, *, scale: float) -> Tensor | None:
    """Attention of a row, [N, H, D]; None if no installed kernel supports its dtype and head size."""
    kernel = _kernel()
    if kernel is None or heads_HND[0].shape[-1] > MAX_HEAD_SIZE or heads_HND[0].dtype not in KERNEL_DTYPES:
        return None
    q, k, v = (x.transpose(0, 1).contiguous() for x in heads_HND)
    out, lse = kernel((q, k, v), (row.segments, row.segments), scale, True)
    if row.branch_rows_M is None or row.branches is None or row.trunk_rows_L is None or row.trunks is None:
        return out
    # Not causal: a branch follows its whole trunk, so each of its tokens attends to every key of it.
    heads = q[row.branch_rows_M], k[row.trunk_rows_L], v[row.trunk_rows_L]
    seen, seen_lse = kernel(heads, (row.branches, row.trunks), scale, False)
    own, own_lse = out[row.branch_rows_M], lse[row.branch_rows_M]
    # The trunk's share of the softmax's denominator: exp(seen) / (exp(seen) + exp(own)), without overflow.
    share = torch.sigmoid(seen_lse - own_lse)[..., None]
    out[row.branch_rows_M] = torch.lerp(own.float(), seen.float(), share).to(out.dtype)
    return out


@cache
def _kernel() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 - optional
    except ImportError:
        return _torch_kernel()

    def flash(heads: Heads, ends: tuple[Ends, Ends], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        lengths = ends[0].ends, ends[1].ends, ends[0].longest, ends[1].longest
        # return_attn_probs is how flash-attn returns log-sum-exp; it does not compute probabilities for it
        options = {"softmax_scale": scale, "causal": causal, "return_attn_probs": True}
        out, lse, _ = flash_attn_varlen_func(*heads, *lengths, **options)
        return out, _by_token(lse, out)

    return flash


def _torch_kernel() -> Kernel | None:
    """torch's kernel, called by the parameter names of the installed version: they differ between versions."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn  # noqa: PLC0415 - not in every torch
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    call: Callable[..., Any] = varlen_attn
    if not {"scale", "return_aux"} <= known.keys():
        return None

    def attend(heads: Heads, ends: tuple[Ends, Ends], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = heads
        options: dict[str, object] = {"scale": scale, "return_aux": AuxRequest(lse=True)}
        # (-1, 0): any key to the left, none to the right; that is causal
        options |= {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out, lse = call(q, k, v, ends[0].ends, ends[1].ends, ends[0].longest, ends[1].longest, **options)
        return out, _by_token(lse, out)

    return attend


def _by_token(lse: Tensor, out: Tensor) -> Tensor:
    """Log-sum-exp as [tokens, H], float32. Kernels return [H, tokens]; a square one is therefore transposed."""
    return (lse if lse.shape == out.shape[:2] and lse.shape[0] != lse.shape[1] else lse.transpose(0, 1)).float()


def _ends(lengths: Sequence[int], device: torch.device) -> Ends:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Ends(ends.to(device, non_blocking=True), max(lengths))


def _index(parts: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
