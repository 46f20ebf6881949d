"""Attention over a packed row, registered with transformers under NAME: no token attends to another tree or branch.

The keys of a branch are those of its context and its trunk, followed by its own. The plan of the row is an argument of
the model's forward, which transformers passes on to every layer. Sliding windows, soft caps, sinks and value heads of
another size are computed; anything else raises, so that a model that needs it is computed padded.

Shapes: N tokens of the row, H query heads, J key heads, F = H / J queries for each key head, D their size, E the size
of the value heads, C branches of one length, T queries, S keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dense_reward.batching.prefix_trees import Range, Stretch, Tree
from dense_reward.engines.kernels.varlen import Varlen, varlen_attention

NAME = "dense_reward_packed"
QUERY_BLOCK = 256  # queries whose score matrix is materialised at once on the slow path
SCORES = 1 << 24  # bound on the numbers of one materialised tensor: a score matrix, or copied keys or values
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unlike the public function, returns log-sum-exp


class PackedAttentionError(Exception):
    """A model needs something that packed attention cannot compute: compute it padded."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The trees of a row, and their index tensors for CUDA's kernels.

    `layers` collects the layers that called packed attention: a layer that attends some other way is missing in it.
    """

    trees: tuple[Tree, ...]
    varlen: Varlen | None = None
    layers: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class LayerRules:
    """What a layer needs beyond causal attention; scores are multiplied by `scale`, then capped."""

    scale: float
    window: int | None
    cap: float | None
    sinks_H: Tensor | None

    def binds(self, tree: Tree) -> bool:
        """Whether the window is shorter than the tree's longest sequence, so that it hides some key."""
        return self.window is not None and tree.longest_tokens > self.window

    def reach(self, keys: int) -> int:
        """How many of so many keys one block of queries attends to at most."""
        return keys if self.window is None else min(keys, self.window + QUERY_BLOCK)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer's tensors of a row: the inputs of attention, and `out_NHE`, which is written in place."""

    q_HND: Tensor
    k_JND: Tensor
    v_JNE: Tensor
    out_NHE: Tensor


def register() -> None:
    """Register NAME with transformers. No mask is made for it: the plan says which tokens attend to which."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    plan: RowPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key [1, J, N, D], value [1, J, N, E] -> ([1, N, H, E], None).

    Raises PackedAttentionError if the plan did not arrive, or the layer needs something unknown.
    """
    if plan is None:
        raise PackedAttentionError("the model does not pass its forward's arguments to its attention")
    if attention_mask is not None or position_bias is not None:
        raise PackedAttentionError("the model's attention needs its own mask or bias")
    plan.layers.add(int(getattr(module, "layer_idx", -1)))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rules = LayerRules(scale, sliding_window or None, softcap or None, s_aux)  # 0 means none
    q_HND, k_JND, v_JNE = query[0], key[0], value[0]
    kernel = rules.cap is None and k_JND.shape[-1] == v_JNE.shape[-1]  # what no kernel computes
    if kernel and plan.varlen is not None:
        found = varlen_attention((q_HND, k_JND, v_JNE), plan.varlen, scale=scale, window=rules.window, sinks_H=s_aux)
        if found is not None:
            return found[None], None
    if not plan.trees:
        raise PackedAttentionError("no GPU kernel supports its attention, which CUDA graphs need")
    out_NHE = torch.empty((*q_HND.shape[1::-1], v_JNE.shape[-1]), dtype=q_HND.dtype, device=q_HND.device)
    row = LayerTensors(q_HND, k_JND, v_JNE, out_NHE)
    for tree in plan.trees:
        # The CPU's kernel knows no sinks, and no window: it computes trees that the window does not bind.
        flash = kernel and q_HND.device.type == "cpu" and s_aux is None and not rules.binds(tree)
        (_flash_tree if flash else _materialised_tree)(row, tree, rules)
    return out_NHE[None], None


def _flash_tree(row: LayerTensors, tree: Tree, rules: LayerRules) -> None:
    """Three kinds of kernel call: the trunk and each branch causally to itself, and all of them to what precedes them.

    A branch needs the causal mask of the bottom right corner: its first query sees the whole trunk. The kernel aligns
    its causal mask at the top left, so the two parts of a branch's keys are computed apart, those before it without a
    mask, and merged. The trunk's keys are not copied for its branches, unless the trunk has a context itself.
    """
    heads = row.k_JND.shape[0]
    q_JFND = torch.unflatten(row.q_HND, 0, (heads, -1))
    trunk = slice(*tree.trunk)
    out_JFND = torch.unflatten(row.out_NHE, 1, (heads, -1)).permute(1, 2, 0, 3)  # a view: writes go to row.out_NHE
    own_keys = row.k_JND[:, trunk], row.v_JNE[:, trunk]
    of_trunk = _grouped_flash(q_JFND[:, :, trunk], *own_keys, causal=True, scale=rules.scale)
    if tree.context:
        context = _taken(row.k_JND, tree.context), _taken(row.v_JNE, tree.context)
        seen = _grouped_flash(q_JFND[:, :, trunk], *context, causal=False, scale=rules.scale)
        out_JFND[:, :, trunk] = _merged(seen, of_trunk)
    else:
        out_JFND[:, :, trunk] = of_trunk[0]
    if not tree.branches:
        return
    before = (*tree.context, tree.trunk)
    context = _taken(row.k_JND, before), _taken(row.v_JNE, before)
    own = [_own(q_JFND, row.k_JND, row.v_JNE, stretch, rules.scale) for stretch in tree.branches]
    # All stretches of a tree follow the trunk without a gap: one slice.
    branches = slice(trunk.stop, trunk.stop + sum(s.count * s.length for s in tree.branches))
    seen = _grouped_flash(q_JFND[:, :, branches], *context, causal=False, scale=rules.scale)
    out_JFND[:, :, branches] = _merged(seen, (_joined([o for o, _ in own]), _joined([lse for _, lse in own])))


def _taken(heads_JND: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The keys or values of some ranges of the row, one after another; a view if there is only one range."""
    parts = [heads_JND[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat([heads_JND[:, :0], *parts], dim=1)


def _grouped_flash(
    q_JFTD: Tensor, k_JSD: Tensor, v_JSD: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of F query heads to each key head, and its log-sum-exp: [J, F, T, D] and [J, F, T].

    The key heads are the kernel's batch dimension and `expand` has stride 0, so no key is copied for the queries that
    share it.
    """
    shape = -1, q_JFTD.shape[1], -1, -1
    keys, values = k_JSD[:, None].expand(shape), v_JSD[:, None].expand(shape)
    out, lse = _flash(q_JFTD, keys, values, 0.0, causal, scale=scale)
    return out, lse


def _own(q_JFND: Tensor, k_JND: Tensor, v_JND: Tensor, stretch: Stretch, scale: float) -> tuple[Tensor, Tensor]:
    """Each branch of a stretch to itself, causally, all in one call; [J, F, count * length, D] and its log-sum-exp."""
    part, shape = slice(stretch.start, stretch.start + stretch.count * stretch.length), (stretch.count, -1)
    # The branches become part of the batch: [J * count, F, length, D].
    q = torch.unflatten(q_JFND[:, :, part], 2, shape).transpose(1, 2).flatten(0, 1)
    k, v = (torch.unflatten(x[:, part], 1, shape).flatten(0, 1) for x in (k_JND, v_JND))
    out, lse = _grouped_flash(q, k, v, causal=True, scale=scale)
    back = (k_JND.shape[0], stretch.count)
    out, lse = (torch.unflatten(x, 0, back).transpose(1, 2).flatten(2, 3) for x in (out, lse))
    return out, lse


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys from that over each, weighted by their shares of the softmax's denominator.

    first's share is exp(lse1) / (exp(lse1) + exp(lse2)) = sigmoid(lse1 - lse2), which cannot overflow. The log-sum-exp
    is at least float32, and the merge is computed in its dtype: rounded only where the caller writes it.
    """
    share = torch.sigmoid(first[1] - second[1])[..., None]
    return torch.lerp(second[0].to(share.dtype), first[0].to(share.dtype), share)


def _materialised_tree(row: LayerTensors, tree: Tree, rules: LayerRules) -> None:
    """The slow path for what the kernels lack: materialised scores in float32, one block of queries at a time."""
    for part, length, before in _segments(tree, row, rules):
        shape = (-1, length)
        seen = sum(stop - start for start, stop in before)
        keys, values = (
            _with_context(_taken(x, before), torch.unflatten(x[:, part], 1, shape)) for x in (row.k_JND, row.v_JNE)
        )
        q = torch.unflatten(row.q_HND[:, part], 1, shape)
        out = torch.unflatten(row.out_NHE[part], 0, shape)  # a view: writes go to row.out_NHE
        queries = max(1, min(QUERY_BLOCK, SCORES // (len(q) * rules.reach(seen + length))))
        for start in range(0, length, queries):
            stop = min(start + queries, length)
            # Query `start` is at position seen + start: leave out the keys that its window hides from all that follow,
            # and those after the block's last query.
            first = 0 if rules.window is None else max(0, seen + start - rules.window + 1)
            block = slice(first, seen + stop)
            attended = _materialised(
                q[:, :, start:stop], keys[:, :, block], values[:, :, block], seen + start - first, rules
            )
            out[:, start:stop] = attended.permute(1, 2, 0, 3)


def _segments(tree: Tree, row: LayerTensors, rules: LayerRules) -> Iterator[tuple[slice, int, tuple[Range, ...]]]:
    """Tokens computed at once, the length of each sequence in them, and what precedes it.

    First the trunk, then the branches: as many of one length at once as keep the scores of a block, and the keys and
    values, which are copied for each branch here, within SCORES numbers each.
    """
    yield slice(*tree.trunk), tree.tokens, tree.context
    before = (*tree.context, tree.trunk)
    width = max(row.k_JND.shape[-1], row.v_JNE.shape[-1])
    for stretch in tree.branches:
        keys = stretch.length + sum(stop - start for start, stop in before)
        of_branch = len(row.q_HND) * rules.reach(keys) * max(min(stretch.length, QUERY_BLOCK), width)
        at_once = max(1, SCORES // max(of_branch, len(row.k_JND) * keys * width))
        for i in range(0, stretch.count, at_once):
            start = stretch.start + i * stretch.length
            yield slice(start, start + min(at_once, stretch.count - i) * stretch.length), stretch.length, before


def _with_context(context_JSD: Tensor, own_JCTD: Tensor) -> Tensor:
    """[J, C, S + T, D]: the trunk's before each branch's own."""
    if not context_JSD.shape[1]:
        return own_JCTD
    shape = (-1, own_JCTD.shape[1], -1, -1)
    return torch.cat([context_JSD[:, None].expand(shape), own_JCTD], dim=2)  # a copy, unlike expand alone


def _materialised(q_HCTD: Tensor, k_JCSD: Tensor, v_JCSE: Tensor, before: int, rules: LayerRules) -> Tensor:
    """Softmax attention, [H, C, T, E], at least in float32. `before`: keys that precede the first query's own."""
    accumulate = torch.promote_types(q_HCTD.dtype, torch.float32)
    group = q_HCTD.shape[0] // k_JCSD.shape[0]
    k, v = (x.to(accumulate).repeat_interleave(group, dim=0) for x in (k_JCSD, v_JCSE))
    scores = torch.matmul(q_HCTD.to(accumulate), k.transpose(2, 3)) * rules.scale
    if rules.cap is not None:
        scores = torch.tanh(scores / rules.cap) * rules.cap  # before the mask: a capped -inf would be -cap
    # Causal mask aligned at the bottom right: query t is at key position before + t, and the last query sees all keys.
    distance_TS = before + torch.arange(q_HCTD.shape[2], device=q_HCTD.device)[:, None]
    distance_TS = distance_TS - torch.arange(k.shape[2], device=q_HCTD.device)
    hidden_TS = distance_TS < 0
    if rules.window is not None:
        hidden_TS |= distance_TS >= rules.window  # a window of W keys includes the query's own
    scores.masked_fill_(hidden_TS, -torch.inf)  # no row is all -inf, which would be NaN: distance 0 is never hidden
    if rules.sinks_H is not None:
        # One more column that has no value: it only takes its share of the softmax.
        sinks = rules.sinks_H.to(accumulate).reshape(-1, 1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = torch.softmax(scores, dim=3)[..., : k.shape[2]]
    return torch.matmul(weights, v).to(q_HCTD.dtype)
