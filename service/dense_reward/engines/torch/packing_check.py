"""Which models can be computed packed: tested before a pair is served, never assumed.

First come the reasons that the model's class and configuration declare. Then an experiment on a proxy model: the same
architecture with few layers, a small vocabulary, a short window and large random weights, in float32, so that every
mistake changes log-probs by nats. The mistakes that were seen (a mask made from positions, positions that do not start
at 0, recurrent layers, layers that do not call the replaced attention) do not show with one response to a prompt. So
the proxy gets several, longer than its window.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dense_reward.batching.packing import pack
from dense_reward.batching.prefix_trees import SHARED_LEAST
from dense_reward.engines.torch import attention
from dense_reward.engines.torch.model import TorchModel, device_row
from dense_reward.engines.torch.weights import plain_attention
from dense_reward.records import Branch, IdArray, Trunk

Logprobs = NDArray[np.float64]
LAYER_TYPES = {"full_attention", "sliding_attention"}
VOCAB_SIZE = 512
FEEDFORWARD_WIDTH = 128
"""No check depends on it."""
WINDOW_TOKENS = 8
TOLERANCE_NATS = 2e-3
"""The largest difference that rounding makes on the proxy model; the mistakes that were seen make 0.08 and more."""
KERNEL_TOLERANCE_NATS = 0.3
"""Limit on the median difference between a device in a 16-bit dtype and the CPU in float32; rounding makes up to 0.12.
Not the largest: rounding sends a few tokens of a mixture of experts to another expert, which changes them by nats."""


def unsupported_reason(
    model: PreTrainedModel, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """Why a model cannot be computed packed, or None if it can.

    On another device than the CPU, its kernels are tested too, in `dtype`.
    """
    reason = _declared_reason(model)
    if reason is not None:
        return reason
    try:
        proxy = proxy_model(model.config)
    except Exception as error:  # a configuration can break anything here; such a model is served padded
        return f"no small proxy model of it can be built ({type(error).__name__}: {error})"
    try:
        on_cpu = TorchModel(proxy)
        reason = _measured_reason(on_cpu, _layers(model.config))
        if reason is not None or device == "cpu":  # the experiment has tested the CPU's kernels
            return reason
        return _kernel_reason(on_cpu, TorchModel(proxy_model(model.config).to(device, dtype)))
    except (attention.PackedAttentionError, RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())  # in one line


def _declared_reason(model: PreTrainedModel) -> str | None:
    """A reason in what the model's class and configuration declare."""
    config = model.config.get_text_config()
    if not model._can_set_attn_implementation() or not model._supports_attention_backend:
        return "its attention cannot be replaced"
    if model._is_stateful:
        return "it carries a state from token to token"
    if getattr(config, "is_causal", True) is False or getattr(config, "is_encoder_decoder", False):
        return "its attention is not causal"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    return f"it has layers of type {', '.join(others)}" if others else None


def _layers(config: PreTrainedConfig) -> int:
    """The number of first layers that include each kind once, and at least two."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    first = [kinds.index(kind) + 1 for kind in set(kinds)]
    return int(min(text.num_hidden_layers, max([2, *first])))


def proxy_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A small model of the architecture with large random weights, in float32, on the CPU. Always the same weights."""
    small = deepcopy(config.get_text_config())
    layers, whole = _layers(small), small.num_hidden_layers
    # A list with one entry per layer, such as layer_types, must have the new number of layers.
    for name, entry in vars(small).items():
        if isinstance(entry, list) and len(entry) == whole:
            setattr(small, name, entry[:layers])
    small.num_hidden_layers = layers
    small.vocab_size = min(small.vocab_size, VOCAB_SIZE)
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(getattr(small, name), FEEDFORWARD_WIDTH))
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW_TOKENS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # RoBERTa counts positions from pad_token_id + 1, so an id that is still valid stays.
        entry = getattr(small, name, None)
        if not isinstance(entry, int) or entry >= small.vocab_size:
            setattr(small, name, None)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(0)
        proxy: PreTrainedModel = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation=plain_attention(small)
        )
        with torch.no_grad():
            for parameter in proxy.parameters():
                if parameter.ndim > 1:
                    # Twice the usual size: small weights give almost the same log-prob to every id and hide mistakes.
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return proxy


def _trunks(vocab_size: int) -> list[Trunk]:
    """Prompts with several branches each: some of equal length, some of one token, most longer than the window.

    The last two continue the first one, as turns of a conversation do.
    """
    random = np.random.default_rng(0)

    def ids(count: int) -> IdArray:
        return random.integers(0, vocab_size, count).astype(np.int32)

    first = ids(SHARED_LEAST + 1)
    second = np.concatenate([first, ids(5)])
    prompts = [first, ids(3), second, np.concatenate([second, ids(SHARED_LEAST)])]
    lengths = ((5, 19, 1, 19), (13, 2), (7, 7), (3,))
    return [
        Trunk(prompt, tuple(Branch(ids(n), np.ones(n, dtype=bool)) for n in of))
        for prompt, of in zip(prompts, lengths, strict=True)
    ]


def _measured_reason(model: TorchModel, layers: int) -> str | None:
    """A reason in the packed log-probs of a proxy model, compared with those of one plain forward per sequence."""
    trunks = _trunks(model.vocab_size)
    plain = [
        np.array(model.logprobs(trunk.prompt_P.tolist(), branch.ids_T.tolist()))
        for trunk in trunks
        for branch in trunk.branches
    ]
    packed, called = _packed_logprobs(model, trunks)
    if called != set(range(layers)):
        return f"only layers {sorted(called)} of {layers} call the attention that replaces their own"
    difference = max(float(np.abs(a - b).max()) for a, b in zip(plain, packed, strict=True))
    if not difference <= TOLERANCE_NATS:  # also if it is NaN
        return f"packed, its log-probs differ by {difference:.2g} nats"
    leaked = _leak(model, trunks, packed)
    return f"tokens of one response change another's log-probs by {leaked:.2g} nats" if leaked else None


def _packed_logprobs(model: TorchModel, trunks: Sequence[Trunk]) -> tuple[list[Logprobs], set[int]]:
    """Log-probs of every branch, packed into as few rows as possible, and the layers that called packed attention."""
    rope_length_limits = [] if model.rope_length_limit is None else [model.rope_length_limit]
    found: dict[tuple[int, int], Logprobs] = {}
    layers: set[int] = set()
    for packed in pack(trunks, max_tokens=1 << 20, rope_length_limits=rope_length_limits):
        row = device_row(packed, model.device)
        with torch.inference_mode():
            logits_RV = model.head.logits(model.packed_rows(row), slice(0, model.vocab_size)).double()
        logprobs_SV = torch.log_softmax(logits_RV, dim=1).cpu().numpy()[packed.row_S]
        layers |= row.plan.layers
        at = 0
        for leaf in packed.leaves:
            ids_T = leaf.source.ids_T
            found[leaf.trunk, leaf.branch] = logprobs_SV[np.arange(at, at + len(ids_T)), ids_T]
            at += len(ids_T)
    return [found[t, b] for t, trunk in enumerate(trunks) for b in range(len(trunk.branches))], layers


def _leak(model: TorchModel, trunks: Sequence[Trunk], before: Sequence[Logprobs]) -> float:
    """How many nats the row's first branch or its last changes by if all other branches change; 0 for rounding."""
    moved = 0.0
    for kept, place in (((0, 0), 0), ((1, 0), len(trunks[0].branches))):
        changed = [
            Trunk(trunk.prompt_P, tuple(b if (t, i) == kept else _changed(b, model.vocab_size) for i, b in branches))
            for t, trunk in enumerate(trunks)
            for branches in [list(enumerate(trunk.branches))]
        ]
        after, _ = _packed_logprobs(model, changed)
        moved = max(moved, float(np.abs(after[place] - before[place]).max()))
    return moved if not moved <= TOLERANCE_NATS else 0.0  # NaN is a leak too


def _changed(branch: Branch, vocab_size: int) -> Branch:
    return Branch((branch.ids_T + 1) % vocab_size, branch.scored_T)


def _kernel_reason(on_cpu: TorchModel, on_device: TorchModel) -> str | None:
    """A reason in the device's kernels: they differ from the CPU, whose result is already verified."""
    trunks = _trunks(on_cpu.vocab_size)
    expected, found = (np.concatenate(_packed_logprobs(model, trunks)[0]) for model in (on_cpu, on_device))
    off = float(np.median(np.abs(found - expected)))
    if off <= KERNEL_TOLERANCE_NATS:
        return None
    return f"the kernels of {on_device.device} are off by {off:.2g} nats (median, at most {KERNEL_TOLERANCE_NATS})"
