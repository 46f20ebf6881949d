"""A process of its own that scores one batch, and tells what it took beyond the weights and what was said before."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dense_reward.engines.torch.memory import peak_bytes
from dense_reward.engines.torch.model import DTYPES, TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Branch, Trunk, Wants
from faulty_engines import INFO
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

TOKENS = 4096
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TOKENS,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(**SIZES | {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "head_dim": 4}),
    "plain": LlamaConfig(**SIZES),
    "capped": Gemma2Config(**SIZES, attn_logit_softcapping=20.0, sliding_window=TOKENS),
    "windowed": MistralConfig(**SIZES, sliding_window=64),
    "latent": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 8, "head_dim": 16},
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
    ),
    "few experts": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "many experts": Qwen3MoeConfig(**SIZES, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=96),
}
SHAPES: dict[str, tuple[int, int, int]] = {
    "one sequence": (2048, 1, TOKENS - 2048),
    "branches": (1024, 12, 256),
    "short branches": (2048, 1024, 3),
}
"""Tokens of a prompt, branches, tokens of each."""


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def trunk(prompt: int, branches: int, length: int) -> Trunk:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(0, 256, count).astype(np.int32)

    return Trunk(ids(prompt), tuple(Branch(ids(length), np.ones(length, dtype=bool)) for _ in range(branches)))


def main(config_name: str, shape: str, dtype: str) -> None:
    torch.set_num_threads(1)
    config = CONFIGS[config_name]
    models = [TorchModel(AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])) for _ in range(2)]
    engine = PairEngine(models[0], models[1], replace(INFO, vocab_size=256), ComputeOptions(TOKENS))
    batch = [trunk(*SHAPES[shape])]
    engine.score([trunk(3, 2, 4)], Wants(kl=True, entropy=True, top_k=5))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, files_before = status_bytes("VmRSS"), status_bytes("RssFile")
    engine.score(batch, Wants(kl=True, entropy=True, top_k=5))
    libraries = status_bytes("RssFile") - files_before  # pages of them that the system had taken back are no tensors
    bound = peak_bytes(config, tokens=TOKENS, itemsize=DTYPES[dtype].itemsize, cuda=False)
    sys.stdout.write(json.dumps({"peak": status_bytes("VmHWM") - before - libraries, "bound": bound}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
