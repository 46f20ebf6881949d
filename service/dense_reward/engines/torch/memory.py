"""What a batch needs beside the weights, told before the first one."""

from transformers import PreTrainedConfig

from dense_reward.engines.torch.attention import SCORES
from dense_reward.engines.torch.feedforward import ROWS
from dense_reward.engines.torch.logprobs import CPU_TILING, CUDA_TILING

SLACK = 1.25  # what allocators lose between blocks of different sizes


def peak_bytes(config: PreTrainedConfig, *, tokens: int, itemsize: int, cuda: bool) -> int:
    """An upper bound of what a batch of so many tokens needs at once in a model of this configuration.

    Counts the tensors that live together in the widest moment of a layer (norm, attention or feed-forward), the output
    layer's inputs of both models, and a tile of both models' logits. Kernels of the device keep the scores of attention
    to themselves; where they lack something, what is written down instead is bounded by itself.
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
    norm = itemsize * 2 * hidden + 3 * 4 * hidden
    attention = itemsize * (2 * hidden + 8 * query + 2 * keys) + 3 * 4 * query
    feedforward = itemsize * 4 * hidden
    lasting = itemsize * 2 * hidden + 4 * 4 * head_size + 64
    rows = tokens * (max(norm, attention, feedforward) + lasting)
    tiling = CUDA_TILING if cuda else CPU_TILING
    logits = 2 * (itemsize + 8) * tiling.rows * tiling.words
    written = 4 * (4 * SCORES + 2 * max(SCORES, tokens * query)) if _written(text, tokens) else 0
    return int(SLACK * (rows + min(tokens, ROWS) * itemsize * wide + logits + written))


def _head_size(text: PreTrainedConfig) -> int:
    """Of keys; where they have a part that is turned and one that is not, of both together."""
    parts = getattr(text, "qk_nope_head_dim", None), getattr(text, "qk_rope_head_dim", None)
    if parts[0] and parts[1]:
        return int(parts[0] + parts[1])
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _written(text: PreTrainedConfig, tokens: int) -> bool:
    """Whether a batch may need attention that kernels lack: caps, windows that bind, values of another size."""
    window = getattr(text, "sliding_window", None) or tokens
    values = getattr(text, "v_head_dim", None) or _head_size(text)
    return bool(getattr(text, "attn_logit_softcapping", None)) or window < tokens or values != _head_size(text)
