"""Time and memory of a pair of adapters whose lower layers are computed once and whose common weights are held once.

`python -m bench.shared_layers` makes a random decoder and two LoRA adapters of its upper half, loads them as the
service does with sharing and without, each in a fresh process, and writes bench/results/shared_layers.json. Times are
taken in turn on the same loaded models. One thread.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines.torch import load
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.engines.torch.memory import hold_once
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.manifest import Role
from dense_reward.records import Branch, IdArray, Trunk, Wants
from dense_reward_trainer.sft.from_scratch import train_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.circumstances import circumstances
from bench.memory_estimate import ENVIRONMENT, status_bytes

RESULT = Path("bench/results/shared_layers.json")
LAYERS, VOCABULARY = 12, 8192
PROMPT_TOKENS, RESPONSES, RESPONSE_TOKENS = 128, 8, 64
REPEATS = 9
SERVING = ServingOptions(max_batch_tokens=4096, dtype="float32")
"""The files are in bfloat16: in their own dtype, weights on a CPU are pages of the files, which are common anyway."""


def write_pair(folder: Path) -> tuple[Path, Path]:
    """A base of 71M parameters and two adapters of the upper half of its layers, all random."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)  # of peft
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Add 12 and 34."], 300)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=LAYERS,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    base = folder / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(
        r=16,
        target_modules=rf".*\.({'|'.join(map(str, range(LAYERS // 2, LAYERS)))})\..*_proj",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    roles: tuple[Role, Role] = "reference", "sft"
    for role in roles:
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        adopt(str(folder / role), role=role, run_id="bench", renderer="plain")
    return folder / "sft", folder / "reference"


def measure(folder: Path, *, sharing: bool) -> dict[str, object]:
    """Bytes that the loaded pair holds, and, with sharing, seconds of a batch with it and without."""
    torch.set_num_threads(1)
    reports: list[str] = []
    with patch.object(load, "hold_once", hold_once if sharing else lambda *_: 0):
        load_pair(folder / "sft", folder / "reference", SERVING, LoadContext(reports.append))  # libraries, caches
        before = resident_bytes()
        engine = load_pair(folder / "sft", folder / "reference", SERVING, LoadContext(reports.append))[0]
    found: dict[str, object] = {
        "weights_bytes": engine.weights_bytes,
        "resident_bytes": resident_bytes() - before,
        "parameters": sum(each.numel() for each in engine.models[0].transformers_model.parameters()),
        "report": next((line for line in reports if "equal in both models" in line), None),
    }
    return found | (seconds(engine) if sharing else {})


def resident_bytes() -> int:
    """Bytes of this process in memory that are not pages of files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS") - status_bytes("RssFile")


def seconds(engine: PairEngine) -> dict[str, object]:
    """Median seconds of a batch with sharing and without, and the median ratio of neighbours."""
    random = np.random.default_rng(0)

    def ids(count: int) -> IdArray:
        return random.integers(0, VOCABULARY, count).astype(np.int32)

    responses = (Branch(ids(RESPONSE_TOKENS), np.ones(RESPONSE_TOKENS, dtype=bool)) for _ in range(RESPONSES))
    trunks = [Trunk(ids(PROMPT_TOKENS), tuple(responses))]
    apart = PairEngine(*engine.models, engine.info, ComputeOptions(SERVING.max_batch_tokens))
    first, second = (
        [(s.sft_logprob_S.tolist(), s.reference_logprob_S.tolist()) for s in each.score(trunks, Wants())[0]]
        for each in (engine, apart)
    )
    times: dict[str, list[float]] = {"shared": [], "apart": []}
    for _ in range(REPEATS):
        for name, each in (("shared", engine), ("apart", apart)):
            started = time.perf_counter()
            each.score(trunks, Wants())
            times[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["apart"], times["shared"], strict=True)]
    return {
        "bitwise_equal": first == second,
        "tokens": PROMPT_TOKENS + RESPONSES * (RESPONSE_TOKENS - 1),
        "seconds_shared": statistics.median(times["shared"]),
        "seconds_apart": statistics.median(times["apart"]),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="measure the pair in this folder in this process and print it")
    parser.add_argument("--apart", action="store_true", help="hold every weight in each model")
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, sharing=not options.apart)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        shared, apart = (in_a_process("--folder", folder, *extra) for extra in ((), ("--apart",)))
    record = {"layers": LAYERS, "adapted_layers": LAYERS // 2, "with_sharing": shared, "without_sharing": apart}
    RESULT.write_text(json.dumps({**circumstances(), **record}, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def in_a_process(*arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "bench.shared_layers", *arguments]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
