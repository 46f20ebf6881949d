"""Memory: weights that served models have in common are held once, and what a batch needs in addition is predicted.

Weights are common if they are equal to the bit: embeddings, frozen layers, the base of adapters. Only a model that was
just loaded changes: its tensors become views of the other models' storage, which is freed with the last of them.
"""

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dense_reward.engines.kernels.block_attention import ROWS, SCORES
from dense_reward.engines.kernels.varlen import KEYS
from dense_reward.engines.torch.feedforward import rows_at_once
from dense_reward.engines.torch.logprobs import CPU_TILING, CUDA_TILING

Weights = Mapping[str, Tensor]
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, usage and statistics of a container's memory, by version 2 and 1 of cgroups."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAPPED_BYTES = 1 << 20
"""Size from which a weight has a mapping of its own: there can be only some ten thousand."""
SLACK = 1.25  # what allocators lose between blocks of different sizes


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


def own_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU. A large one goes back to the system with the last tensor in it, where malloc would keep it."""
    if tensor.nbytes < MAPPED_BYTES:
        return tensor.clone()
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what several of them share counts once."""
    return sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values())


def free_bytes() -> int:
    """Bytes of memory that this process can still take: of the machine, and of its container if that has a limit."""
    lines = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines())
    free = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    for limit, used, stat in _CGROUP_FILES:
        if _text(limit).isdigit():
            cache = dict(line.split() for line in _text(stat).splitlines()).get("inactive_file", "0")
            free.append(int(_text(limit)) - int(_text(used) or 0) + int(cache))
    return max(0, min(free, default=0))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are on one device, in one dtype and layout, with the same bits (-0.0 is not 0.0)."""
    if (one.device, one.dtype, one.shape, one.stride()) != (other.device, other.dtype, other.shape, other.stride()):
        return False
    if one.data_ptr() == other.data_ptr():
        return True
    kind = _INTEGERS.get(one.itemsize)
    return kind is not None and torch.equal(one.detach().view(kind), other.detach().view(kind))


def peak_bytes(config: PreTrainedConfig, *, tokens: int, itemsize: int, cuda: bool) -> int:
    """An upper bound of what a batch of so many tokens needs at one time in a model of this configuration.

    Counts the tensors that live at the same time in the widest moment of a layer (norm, attention or feed-forward), the
    output layer's inputs of both models, and a tile of both models' logits. Kernels of the device keep attention scores
    to themselves; what is materialised if they lack something has its own bound.

    This bounds the live tensors of one batch. glibc keeps freed blocks in its heap, so the resident set of a process
    that computed batches of many shapes can be larger.
    """
    text = config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head_size = _head_size(text)
    query = heads * head_size
    keys = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * head_size
    wide = 3 * int(getattr(text, "intermediate_size", None) or 4 * hidden)
    experts = int(getattr(text, "num_experts_per_tok", None) or 0)
    expert = int(getattr(text, "moe_intermediate_size", None) or wide // 3)
    wide = max(wide, experts * (2 * hidden + 3 * expert))
    # Numbers of 4 bytes are in float32 whatever the dtype of the weights: norms, rotary embeddings, merged attention.
    norm = itemsize * 2 * hidden + 3 * 4 * hidden
    attention = itemsize * (2 * hidden + 8 * query + 3 * keys) + 3 * 4 * query  # `keys`: once more if gathered
    feedforward = itemsize * 4 * hidden
    lasting = itemsize * 2 * hidden + 4 * 4 * head_size + 64
    rows = tokens * (max(norm, attention, feedforward) + lasting)
    tiling = CUDA_TILING if cuda else CPU_TILING
    logits = 2 * (itemsize + 8) * tiling.rows * tiling.vocab
    if _may_materialise(text, tokens):
        materialised = 4 * (4 * SCORES + 2 * max(SCORES, tokens * query))
    else:  # on a CPU, a block of scores, its softmax and keys; a GPU's kernels keep all of it to themselves
        materialised = 0 if cuda else 4 * (3 * min(SCORES, max(ROWS, heads) * tokens) + keys * tokens)
    # Each sequence gathers what precedes it and itself; where each continues the one before it, half of all pairs.
    gathered = itemsize * keys * min(KEYS, tokens + tokens * tokens // 2) if cuda else 0
    inner = min(tokens, rows_at_once(cuda=cuda)) * itemsize * wide
    return int(SLACK * (rows + max(inner, materialised + gathered, logits)))  # one after another


def _head_size(text: PreTrainedConfig) -> int:
    """Size of a key head: the sum of both parts if only one part of it gets rotary embeddings."""
    parts = getattr(text, "qk_nope_head_dim", None), getattr(text, "qk_rope_head_dim", None)
    if parts[0] and parts[1]:
        return int(parts[0] + parts[1])
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _may_materialise(text: PreTrainedConfig, tokens: int) -> bool:
    """Whether a batch may need the materialised attention path.

    That is with soft caps, a sliding window shorter than the batch, or value heads of another size.
    """
    window = getattr(text, "sliding_window", None) or tokens
    values = getattr(text, "v_head_dim", None) or _head_size(text)
    return bool(getattr(text, "attn_logit_softcapping", None)) or window < tokens or values != _head_size(text)
