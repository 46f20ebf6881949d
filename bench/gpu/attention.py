"""Stage: the attention kernels against float64, with the shapes of real models and long branches."""

import torch
from dense_reward.batching.packing import pack
from dense_reward.batching.prefix_trees import Tree
from dense_reward.engines.kernels.varlen import varlen_of
from dense_reward.engines.torch.attention import RowPlan, packed_attention
from torch import Tensor, nn

from bench.gpu.machine import TINY_LENGTHS, Machine, Record, trunks_of
from bench.speed.workload import Lengths

HEADS = {"7:1 of 128": (28, 4, 128), "7:1 of 64": (14, 2, 64), "1:1 of 96": (8, 8, 96), "2:1 of 256": (8, 4, 256)}
ROWS: dict[str, Lengths] = {
    "512 + 8 x 1024": ((512, (1025,) * 8),),
    "ragged": ((700, (400, 3, 77, 1025, 2)), (33, (5, 9)), (130, ()), (1, (1025, 65))),
}
RULES: dict[str, dict[str, float]] = {
    "causal": {},
    "window 1": {"sliding_window": 1},
    "window 100": {"sliding_window": 100},
    "window 1000": {"sliding_window": 1000},
    "sinks": {},
    "cap": {"softcap": 20.0},
}
TIMES_FLASH = 1.5
"""Largest root mean square error, in units of that of torch's scaled_dot_product_attention for the same sequences."""


def stage(machine: Machine, record: Record) -> None:
    """Fails if an error is larger than rounding."""
    worst = 0.0
    for heads_name, (heads, groups, size) in HEADS.items():
        for row_name, lengths in ({"tiny": TINY_LENGTHS} if machine.tiny else ROWS).items():
            for rule_name, rules in RULES.items():
                errors = _errors(machine, (heads, groups, size), lengths, rules, sinks=rule_name == "sinks")
                record(**{f"{heads_name}, {row_name}, {rule_name}": errors})
                worst = max(worst, errors["rms"] / max(errors["rms_of_torch"], 1e-9))
    record(worst_ratio=worst)
    if not worst <= TIMES_FLASH:
        raise SystemExit(f"an error is {worst:.2f} times that of torch's own attention, at most {TIMES_FLASH}")


def _errors(
    machine: Machine, shape: tuple[int, int, int], lengths: Lengths, rules: dict[str, float], *, sinks: bool
) -> dict[str, float]:
    """Root mean square and largest error of bfloat16 attention, and those of torch's for sequences one by one."""
    heads, groups, size = shape
    trees = _trees(lengths)
    tokens = sum(t.tokens + sum(s.count * s.length for s in t.branches) for t in trees)
    random = torch.Generator(machine.device).manual_seed(0)
    q, k, v = (
        2 * torch.randn(1, n, tokens, size, generator=random, device=machine.device) for n in (heads, groups, groups)
    )
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    sinks_H = torch.linspace(-2, 4, heads, device=machine.device) if sinks else None
    varlen = varlen_of(trees, machine.device) if machine.device.type == "cuda" else None
    found, _ = packed_attention(nn.Identity(), q, k, v, None, plan=RowPlan(trees, varlen), s_aux=sinks_H, **rules)  # type: ignore[arg-type]
    total, largest, of_torch, count = 0.0, 0.0, 0.0, 0
    for tree in trees:
        for own, seen in _sequences(tree):
            part = q[0, :, own], k[0][:, seen], v[0][:, seen]
            exact = _attended([x.double() for x in part], rules, sinks_H)
            error = found[0, own].transpose(0, 1).double() - exact
            rounded = _attended([x.float() for x in part], rules, sinks_H).to(torch.bfloat16)
            if not rules and not sinks:
                rounded = _torch(part)
            total += float(error.square().sum())
            of_torch += float((rounded.double() - exact).square().sum())
            largest, count = max(largest, float(error.abs().max())), count + error.numel()
    return {"rms": (total / count) ** 0.5, "largest": largest, "rms_of_torch": (of_torch / count) ** 0.5}


def _trees(lengths: Lengths) -> tuple[Tree, ...]:
    trunks = trunks_of([(prompt, responses or (2,)) for prompt, responses in lengths], 1000)  # type: ignore[arg-type]
    (packed,) = pack(trunks, max_tokens=1 << 30)
    return packed.trees


def _sequences(tree: Tree) -> list[tuple[slice, list[int]]]:
    """The own tokens of each sequence, and all that it attends to."""
    starts = [(s.start + i * s.length, s.length) for s in tree.branches for i in range(s.count)]
    parts = [(tree.trunk, tree.context)]
    parts += [((start, start + length), (*tree.context, tree.trunk)) for start, length in starts]
    return [(slice(*own), [row for part in (*before, own) for row in range(*part)]) for own, before in parts]


def _attended(heads: list[Tensor], rules: dict[str, float], sinks_H: Tensor | None) -> Tensor:
    """Attention with every score, in the dtype of the heads: [H, T, D]."""
    q, k, v = heads
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if "softcap" in rules:
        scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
    distance = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    distance = distance - torch.arange(k.shape[1], device=q.device)
    hidden = (distance < 0) | (distance >= rules.get("sliding_window", torch.inf))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(q.dtype)[:, None, None].expand(*scores.shape[:2], 1)], dim=2)
    return torch.softmax(scores, dim=2)[..., : k.shape[1]] @ v


def _torch(heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """torch's own attention in bfloat16; the mask is aligned at the bottom right."""
    q, k, v = (x[None] for x in heads)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)[0]
