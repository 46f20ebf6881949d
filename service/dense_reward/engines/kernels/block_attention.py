"""Attention over a packed row by matmuls, one block of queries at a time, for any device, dtype, window, cap and sink.

On CPUs it is also the faster way for most models, because torch's kernel computes small matmuls, far below what the
processor can do. attention.block_gain measures both.

Shapes: N tokens of the row, H query heads, J key heads, F = H / J queries for each key head, D their size, E the size
of the value heads, C branches of one length, T queries of a sequence, S keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dense_reward.batching.prefix_trees import Range, Tree

QUERY_BLOCK, ROWS = 256, 1024
"""A block has at most so many queries of a sequence, and so many rows: queries times F."""
FEW_ROWS = 256
"""Branches with fewer rows are computed together, in one batched matmul."""
QUERY_STEP, KEY_STEP = 16, 64
"""On a CPU, matmuls of a block have multiples of so many queries and keys: oneDNN compiles each size by itself, which
takes longer than the matmul, and up to a megabyte."""
SCORES = 1 << 24
"""Bound on the numbers of one tensor of a block: its scores, or copied keys or values."""


@dataclass(frozen=True, slots=True)
class LayerRules:
    """What a layer needs beyond causal attention; scores are multiplied by `scale`, then capped."""

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks_H: Tensor | None = None

    def binds(self, tree: Tree) -> bool:
        """Whether the window is shorter than the tree's longest sequence, so that it hides some key."""
        return self.window is not None and tree.longest_tokens > self.window

    def reach(self, keys: int) -> int:
        """How many of so many keys one block of queries attends to at most."""
        return keys if self.window is None else min(keys, self.window + QUERY_BLOCK)


@dataclass(frozen=True, slots=True)
class Block:
    """`count` sequences of `length` queries, one after another from index `start` of the row, and what precedes each.

    The queries of one sequence can be a part of it; then its earlier tokens are in `before` too.
    """

    start: int
    count: int
    length: int
    before: tuple[Range, ...]

    @property
    def part(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def before_tokens(self) -> int:
        return _tokens(self.before)


class BlockRow:
    """One layer's queries, keys and values of a row, laid out for matmuls, and the output, which is written in place.

    Scores are computed at least in float32: rounded to bfloat16 they would be off by up to 0.4 % of themselves.
    """

    def __init__(self, q_HND: Tensor, k_JND: Tensor, v_JNE: Tensor, out_NHE: Tensor, rules: LayerRules) -> None:
        accumulate = torch.promote_types(q_HND.dtype, torch.float32)
        heads = k_JND.shape[0]
        self._rules = rules
        self._group = q_HND.shape[0] // heads
        self._on_cpu = q_HND.device.type == "cpu"
        tokens, size = q_HND.shape[1:]
        # Queries of a block can reach beyond the row's end; what they give is dropped.
        extra = QUERY_STEP if self._on_cpu else 0
        shape = heads, tokens + extra, self._group, size
        self._q_JNFD = torch.empty(shape, dtype=accumulate, device=q_HND.device)
        self._q_JNFD[:, :tokens] = torch.unflatten(q_HND, 0, (heads, -1)).transpose(1, 2)
        self._q_JNFD[:, tokens:] = 0
        self._k_JND = (k_JND.to(accumulate) * rules.scale).contiguous()  # fewer numbers than the queries
        # Weights are at most 1, so that their rounding adds no more than that of the values.
        self._v_JNE = v_JNE.contiguous() if v_JNE.dtype is torch.bfloat16 else v_JNE.to(accumulate).contiguous()
        self._out_JNFE = torch.unflatten(out_NHE, 1, (heads, -1)).transpose(0, 1)  # a view: writes go to out_NHE
        self._sinks_JF = None if rules.sinks_H is None else rules.sinks_H.to(accumulate).reshape(heads, -1)

    def attend(self, tree: Tree) -> None:
        """Write the output of all tokens of a tree."""
        for block in self._blocks(tree):
            if block.count == 1 and self._on_cpu:
                for head in range(len(self._k_JND)):
                    self._attend(block, slice(head, head + 1), QUERY_STEP, KEY_STEP)
            else:
                self._attend(block, slice(None), 1, 1)

    def _blocks(self, tree: Tree) -> Iterator[Block]:
        """The trunk, then the branches: long sequences in parts, several short ones together."""
        yield from self._blocks_of(tree.start, 1, tree.tokens, tree.context)
        for stretch in tree.branches:
            yield from self._blocks_of(stretch.start, stretch.count, stretch.length, (*tree.context, tree.trunk))

    def _blocks_of(self, start: int, count: int, length: int, before: tuple[Range, ...]) -> Iterator[Block]:
        keys = self._rules.reach(_tokens(before) + length)
        heads = len(self._k_JND)
        if count > 1 and length * self._group < FEW_ROWS:
            width = max(self._q_JNFD.shape[-1], self._v_JNE.shape[-1])
            together = SCORES // (heads * keys * max(self._group * min(length, QUERY_BLOCK), width))
            if together > 1:
                for first in range(0, count, together):
                    yield Block(start + first * length, min(together, count - first), length, before)
                return
        at_once = 1 if self._on_cpu else heads
        queries = max(1, min(QUERY_BLOCK, ROWS // self._group, SCORES // (at_once * self._group * keys)))
        if self._on_cpu and queries > QUERY_STEP:
            queries -= queries % QUERY_STEP
        for sequence in range(start, start + count * length, length):
            for first in range(sequence, sequence + length, queries):
                own = ((sequence, first),) if first > sequence else ()
                yield Block(first, 1, min(queries, sequence + length - first), (*before, *own))

    def _attend(self, block: Block, heads: slice, query_step: int, key_step: int) -> None:
        """Softmax attention of one block, for some key heads; the shapes are multiples of the steps."""
        rules, length = self._rules, block.length
        # The keys that the window hides from the first query, it hides from all that follow.
        hidden = 0 if rules.window is None else max(0, block.before_tokens - rules.window + 1)
        queries, seen = _up(length, query_step), block.before_tokens - hidden
        keys = _up(seen + length, key_step)
        padding = keys - seen - length
        part = slice(block.start, block.start + block.count * length + queries - length)
        q_JCTFD = torch.unflatten(self._q_JNFD[heads, part], 1, (block.count, queries))
        k_JCSD, v_JCSE = (_keys(x[heads], block, hidden, padding) for x in (self._k_JND, self._v_JNE))
        scores_JCTFS = torch.unflatten(_product(q_JCTFD.flatten(2, 3), k_JCSD), 2, (queries, -1))
        if rules.cap is not None:
            scores_JCTFS = torch.tanh(scores_JCTFS / rules.cap) * rules.cap  # before the mask: else -inf becomes -cap
        scores_JCTFS[..., :padding].fill_(-torch.inf)
        if length > 1:
            own = scores_JCTFS[..., keys - length :]
            own.masked_fill_(_later(queries, length, own.device)[:, None], -torch.inf)
        if rules.window is not None and seen + length > rules.window:
            # The window includes the query's own key. It hides no key of distance 0, so never a whole row.
            far_TS = _distances(queries, seen, seen + length, scores_JCTFS.device) >= rules.window
            scores_JCTFS[..., padding:].masked_fill_(far_TS[:, None], -torch.inf)
        if self._sinks_JF is not None:
            # One more column that has no value: it only takes its share of the softmax.
            sinks = self._sinks_JF[heads, None, None, :, None].expand(*scores_JCTFS.shape[:4], 1)
            scores_JCTFS = torch.cat([scores_JCTFS, sinks], dim=4)
        weights_JCRS = torch.softmax(scores_JCTFS, dim=4)[..., :keys].flatten(2, 3)
        found_JCRE = _product(weights_JCRS.to(v_JCSE.dtype), v_JCSE.transpose(2, 3))
        found_JTFE = torch.unflatten(found_JCRE, 2, (queries, -1)).flatten(1, 2)
        self._out_JNFE[heads, block.part] = found_JTFE[:, : block.count * length].to(self._out_JNFE.dtype)


def _keys(heads_JND: Tensor, block: Block, hidden: int, padding: int) -> Tensor:
    """[J, C, S, D]: zeros, what precedes each sequence of the block without its first `hidden` tokens, then its own."""
    own_JCTD = torch.unflatten(heads_JND[:, block.part], 1, (block.count, block.length))
    parts = [own_JCTD.new_zeros(len(own_JCTD), block.count, padding, own_JCTD.shape[3])] if padding else []
    for start, stop in block.before:
        if hidden < stop - start:
            parts.append(heads_JND[:, None, start + hidden : stop].expand(-1, block.count, -1, -1))
        hidden = max(0, hidden - (stop - start))
    return torch.cat([*parts, own_JCTD], dim=2) if parts else own_JCTD


def _product(x_JCRI: Tensor, y_JCOI: Tensor) -> Tensor:
    """x y^T, [J, C, R, O]; for two float32 matrices on a CPU by oneDNN, which is faster on AMD's processors."""
    if x_JCRI.device.type == "cpu" and x_JCRI.dtype is torch.float32 and x_JCRI.shape[:2] == (1, 1) and _has_onednn():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_JCRI[0, 0], y_JCOI[0, 0].contiguous(), None, "none", [], ""
        )
        return found[None, None]
    return torch.matmul(x_JCRI, y_JCOI.transpose(2, 3))


@cache
def _has_onednn() -> bool:
    """Whether this build of torch has the operator."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _later(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which of a sequence's own tokens come after each of its queries, [T, S]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu_(1)


def _distances(queries: int, first: int, keys: int, device: torch.device) -> Tensor:
    """Positions from each key to each query, [T, S]; the first query is at key `first`."""
    return torch.arange(first, first + queries, device=device)[:, None] - torch.arange(keys, device=device)


def _up(count: int, step: int) -> int:
    """The next multiple of step."""
    return -(-count // step) * step


def _tokens(ranges: tuple[Range, ...]) -> int:
    return sum(stop - start for start, stop in ranges)
