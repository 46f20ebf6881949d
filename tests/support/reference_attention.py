"""Attention over a packed row, materialised in float64 with every score and one mask, to compare kernels with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
import torch
from dense_reward.batching.packing import pack
from dense_reward.batching.prefix_trees import SHARED_LEAST, Tree
from dense_reward.records import Branch, Trunk
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Shape = tuple[int, tuple[int, ...]]
"""Tokens of a prompt, and of each of its branches."""
Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


def trees_of(*shapes: Shape) -> tuple[Tree, ...]:
    """A row with these prompts and branches; each branch is computed to its end. No two of them begin alike."""
    different = count()
    trunks = [
        Trunk(_ids(prompt, next(different)), tuple(_branch(_ids(n + 1, next(different))) for n in lengths or (0,)))
        for prompt, lengths in shapes
    ]
    (packed,) = pack(trunks, max_tokens=1 << 30)
    return packed.trees


def nested_trees(*, shared: int = SHARED_LEAST) -> tuple[Tree, ...]:
    """A row of conversations that begin with one system prompt, and of one that does not; some turns have branches."""
    different = count(1)

    def new(tokens: int) -> Ids:
        return _ids(tokens, next(different))

    system, other = new(shared + 3), new(5)
    first, second = ([system, *(new(shared + n) for n in lengths)] for lengths in ((0, 4, 1), (2, 0)))
    prompts = [
        system,
        *(np.concatenate(turns[:n]) for turns in (first, second) for n in range(2, len(turns) + 1)),
        other,
    ]
    lengths_of = [(3, 3), (9,), (7, 2, 2), (1, 60), (4,), (5, 5, 8), (2,)]
    trunks = [
        Trunk(prompt, tuple(_branch(new(n + 1)) for n in lengths))
        for prompt, lengths in zip(prompts, lengths_of, strict=True)
    ]
    (packed,) = pack(trunks, max_tokens=1 << 30)
    return packed.trees


def _ids(tokens: int, token: int) -> Ids:
    return np.full(tokens, token, dtype=np.int32)


def _branch(ids_T: Ids) -> Branch:
    return Branch(ids_T, np.arange(len(ids_T)) == len(ids_T) - 1)


def tokens_of(trees: Sequence[Tree]) -> int:
    return sum(tree.tokens + sum(s.count * s.length for s in tree.branches) for tree in trees)


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries [1, H, N, D], keys [1, J, N, D] and values [1, J, N, E] of a row."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """Without the batch dimension."""
        return self.q[0], self.k[0], self.v[0]


def random_heads(
    tokens: int, *, keys: int, group: int, size: int, value_size: int | None = None, dtype: torch.dtype, seed: int = 0
) -> Heads:
    """Numbers large enough that attention is far from an average."""
    random = torch.Generator().manual_seed(seed)

    def some(heads: int, width: int) -> Tensor:
        return (2 * torch.randn(1, heads, tokens, width, generator=random, dtype=torch.float64)).to(dtype)

    return Heads(some(keys * group, size), some(keys, size), some(keys, value_size or size))


def attended(
    heads: Heads,
    trees: tuple[Tree, ...],
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention outputs, [N, H, E] in float64."""
    q, k, v = (x.double() for x in heads.plain)
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores_HNN = q @ k.transpose(1, 2) * scale
    if cap is not None:
        scores_HNN = cap * torch.tanh(scores_HNN / cap)
    weights_HNN = scores_HNN.masked_fill(~_seen(trees, window), -torch.inf).exp()
    total_HN1 = weights_HNN.sum(2, keepdim=True)
    if sinks_H is not None:
        total_HN1 = total_HN1 + sinks_H.double().exp()[:, None, None]
    return (weights_HNN / total_HN1 @ v).transpose(0, 1)


@cache
def _seen(trees: tuple[Tree, ...], window: int | None) -> Tensor:
    """[N, N]: whether a token attends to another, set token by token."""
    segments: list[tuple[int, int, Tree]] = []
    for tree in trees:
        segments.append((tree.start, tree.tokens, tree))
        for s in tree.branches:
            segments.extend((s.start + i * s.length, s.length, tree) for i in range(s.count))
    seen = torch.zeros(tokens_of(trees), tokens_of(trees), dtype=torch.bool)
    for start, length, tree in segments:
        ranges = tree.context if start == tree.start else (*tree.context, tree.trunk)
        before = [row for first, last in ranges for row in range(first, last)]
        line = torch.tensor([*before, *range(start, start + length)])
        for offset in range(length):
            position = len(before) + offset
            first = 0 if window is None else max(0, position - window + 1)
            seen[start + offset, line[first : position + 1]] = True
    return seen
