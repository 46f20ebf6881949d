"""Compares the memory estimate of sft with the measured peak of training steps, on a CPU.

`python -m bench.memory_estimate` measures each case in a fresh process and writes bench/results/memory_estimate.json.
With an environment variable glibc maps large blocks by itself, so the resident set follows the live tensors.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.jobs.sft import training_arguments
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from dense_reward_trainer.sft.memory import StepShape, estimate
from dense_reward_trainer.sft.memory_check import model_sizes
from trl import SFTTrainer

from bench.circumstances import circumstances

RESULT = Path("bench/results/memory_estimate.json")
ENVIRONMENT: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
CASES: Mapping[str, Mapping[str, int]] = {
    "5M": {"hidden": 256, "layers": 6, "heads": 4, "intermediate": 704, "vocabulary": 1024, "rows": 8},
    "20M": {"hidden": 384, "layers": 10, "heads": 6, "intermediate": 1152, "vocabulary": 4096, "rows": 8},
    "60M": {"hidden": 640, "layers": 11, "heads": 10, "intermediate": 1792, "vocabulary": 8192, "rows": 4},
}
TOKENS = 256
STEPS = 3


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, checkpointing: bool) -> dict[str, object]:
    """Trains a few steps with the trainer of sft; returns the estimate and the peak beyond what was there before."""
    torch.set_num_threads(1)
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"output_dir={folder}",
            f"batch_size={case['rows']}",
            f"max_steps={STEPS}",
            "save_every_steps=1000",
            "eval_every_steps=null",
            f"gradient_checkpointing={str(checkpointing).lower()}",
            f"scratch={{hidden_size: {case['hidden']}, layers: {case['layers']}, heads: {case['heads']}, "
            f"intermediate_size: {case['intermediate']}, max_position_embeddings: {TOKENS}}}",
        ]
        config = load_config(SftConfig, config_path("arithmetic_sft_tiny"), overrides)
        assert config.scratch is not None
        tokenizer = train_tokenizer(["Add 12 and 34."], 300)

        def trainer(vocabulary: int, options: object) -> SFTTrainer:
            ids = [[(7 * i + row) % 300 for i in range(TOKENS)] for row in range(case["rows"] * STEPS)]
            model = random_model(options, tokenizer, 0)  # type: ignore[arg-type]
            model.resize_token_embeddings(vocabulary)
            return SFTTrainer(
                model=model,
                args=training_arguments(config),
                train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
                processing_class=tokenizer,
            )

        small = config.scratch.model_copy(update={"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32})
        trainer(300, small).train()  # what libraries allocate once
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
        before, files_before = status_bytes("VmRSS"), status_bytes("RssFile")
        measured = trainer(case["vocabulary"], config.scratch)
        measured.train()
        peak = status_bytes("VmHWM") - before - (status_bytes("RssFile") - files_before)
        tokens = case["rows"] * TOKENS
        step = StepShape(tokens=tokens, learnt=tokens, checkpointing=checkpointing)
        sizes = model_sizes(measured.model, None)
        assert sizes is not None, "a Llama has attention heads"
        needs = estimate(sizes, step)
    return {
        "case": name,
        "checkpointing": checkpointing,
        "parameters": sizes.trained,
        "tokens": tokens,
        "estimate": asdict(needs),
        "measured_peak": peak,
        "relative_error": needs.peak / peak - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="measure one case in this process and print it")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.case, options.checkpointing)))
        return
    rows = []
    for name in CASES:
        for extra in ((), ("--checkpointing",)):
            command = [sys.executable, "-m", "bench.memory_estimate", "--case", name, *extra]
            done = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name} {' '.join(extra)}: {rows[-1]['relative_error']:+.1%}")
    write(rows)


def write(rows: list[dict[str, object]]) -> None:
    worst = max(abs(float(str(row["relative_error"]))) for row in rows)
    RESULT.write_text(json.dumps({**circumstances(), "memory_estimate_error": worst, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
