"""A separate process that scores one batch for each case, and prints what the batch took and what was predicted.

`python peak_memory.py CASES`, CASES a JSON list of [config, shape, dtype]; prints one JSON object for each. It must run
with `ENVIRONMENT`: glibc then maps every large block by itself and returns it to the system when it is freed, so the
resident set follows the live tensors. By default freed blocks stay in glibc's heap, whose holes depend on the order of
earlier blocks: the same batch, which takes 51 MB, then raises the resident set by anything from 66 to 164 MB.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dense_reward.engines.torch.memory import peak_bytes
from dense_reward.engines.torch.model import DTYPES, TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Branch, Trunk, Wants
from dense_reward.telemetry.process_memory import KEPT_KERNELS, KERNEL_CACHES
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

ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    **dict.fromkeys(KERNEL_CACHES, str(KEPT_KERNELS)),  # as the service: what they hold is no part of a batch
}
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
"""Prompt tokens, number of branches, tokens of each branch."""
EVERYTHING = Wants(kl=True, entropy=True, varentropy=True, top_k=5)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def trunk(prompt: int, branches: int, length: int) -> Trunk:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(0, 256, count).astype(np.int32)

    return Trunk(ids(prompt), tuple(Branch(ids(length), np.ones(length, dtype=bool)) for _ in range(branches)))


def measure(config_name: str, shape: str, dtype: str) -> dict[str, int]:
    """Bytes that a batch took beyond the weights (`peak`), and the prediction (`bound`)."""
    config = CONFIGS[config_name]
    # a copy for each model: transformers stores a model's attention in its configuration
    models = [TorchModel(AutoModelForCausalLM.from_config(deepcopy(config), dtype=DTYPES[dtype])) for _ in range(2)]
    engine = PairEngine(models[0], models[1], replace(INFO, vocab_size=256), ComputeOptions(TOKENS))
    batch = [trunk(*SHAPES[shape])]
    engine.score([trunk(3, 2, 4)], EVERYTHING)  # a first call, because kernels allocate memory at their first call
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else blocks that an earlier case freed can serve this one, and do not count
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
    before, files_before = status_bytes("VmRSS"), status_bytes("RssFile")
    engine.score(batch, EVERYTHING)
    libraries = status_bytes("RssFile") - files_before  # pages of libraries that were loaded meanwhile are not tensors
    bound = peak_bytes(config, tokens=TOKENS, itemsize=DTYPES[dtype].itemsize, cuda=False)
    return {"peak": status_bytes("VmHWM") - before - libraries, "bound": bound}


def main(cases: str) -> None:
    torch.set_num_threads(1)
    for case in json.loads(cases):
        sys.stdout.write(json.dumps(measure(*case)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
