"""Attention over a packed row, registered with transformers under NAME: no token attends to another tree or branch.

The keys of a branch are those of its context and its trunk, followed by its own. The plan of the row is an argument of
the model's forward, which transformers passes on to every layer. Sliding windows, soft caps, sinks and value heads of
another size are computed; anything else raises, so that a model that needs it is computed padded.

Shapes: N tokens of the row, H query heads, J key heads, F = H / J queries for each key head, D their size, E the size
of the value heads, C branches of one length, T queries, S keys.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dense_reward.batching.prefix_trees import Range, Stretch, Tree
from dense_reward.engines.kernels.block_attention import BlockRow, LayerRules
from dense_reward.engines.kernels.measured import times_as_fast
from dense_reward.engines.kernels.varlen import Varlen, varlen_attention

NAME = "dense_reward_packed"
LEAST_SIZE, MEASURED = 32, (torch.float32, torch.bfloat16)
"""Heads and dtypes for which two ways of computing are measured."""
LEAST_GAIN = 1.1
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
    # The CPU's kernel knows no sinks, and no window: it can compute the trees that the window does not bind.
    flash = kernel and q_HND.device.type == "cpu" and s_aux is None
    flash = flash and not _blocks_are_faster(q_HND, k_JND)
    blocks: BlockRow | None = None
    for tree in plan.trees:
        if flash and not rules.binds(tree):
            _flash_tree(row, tree, rules)
        else:
            blocks = blocks or BlockRow(q_HND, k_JND, v_JNE, out_NHE, rules)
            blocks.attend(tree)
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


def _blocks_are_faster(q_HND: Tensor, k_JND: Tensor) -> bool:
    """Whether matmuls compute these heads faster than torch's kernel does on this CPU.

    Never with deterministic algorithms: the measurement may come out differently at the next start.
    """
    if q_HND.shape[2] < LEAST_SIZE or q_HND.dtype not in MEASURED or torch.are_deterministic_algorithms_enabled():
        return False
    shape = q_HND.shape[0], k_JND.shape[0], q_HND.shape[2]
    return block_gain(*shape, q_HND.dtype, torch.get_num_threads()) > LEAST_GAIN


@cache
def block_gain(heads: int, key_heads: int, size: int, dtype: torch.dtype, threads: int) -> float:
    """How many times as fast as torch's kernel block_attention.py is on this CPU; measured once for a shape of heads.

    The row is a prompt of 128 tokens with four responses of 256. `threads`: torch's, on which it depends.
    """
    tree = Tree(0, 128, (Stretch(128, 4, 256),))
    tokens = 128 + 4 * 256
    rules = LayerRules(size**-0.5)
    # Strides as in a forward: [N, heads, D] seen as [heads, N, D].
    q_HND, k_JND, v_JND, out_HND = (
        torch.ones(tokens, count, size, dtype=dtype).transpose(0, 1) for count in (heads, key_heads, key_heads, heads)
    )
    row = LayerTensors(q_HND, k_JND, v_JND, out_HND.transpose(0, 1))

    def flash() -> None:
        _flash_tree(row, tree, rules)

    def blocks() -> None:
        BlockRow(q_HND, k_JND, v_JND, row.out_NHE, rules).attend(tree)

    with torch.inference_mode():
        return times_as_fast(blocks, flash)
