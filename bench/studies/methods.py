"""The figures at the top of bench/results/methods.json: a row for each method, and three checks of the trainer.

An exact round of SPIN and SFT in two processes are measured here; the error of the memory estimate is that of
bench/results/memory_estimate.json.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dense_reward_trainer.runs.local_service import free_port
from dense_reward_trainer.studies.methods.exact_spin import spin_round_error

from bench.studies.evidence import Record

ESTIMATE = Path("bench/results/memory_estimate.json")
PROGRAM = "dense_reward_trainer.cli"
COMPARED_STEPS = 20


def keys(study: Record) -> dict[str, object]:
    """The rows, how many seeds they have, and the checks."""
    return {
        "methods": [*rows(study)],
        "seeds": {regime: len(cells) for regime, cells in study["cells"].items()},
        "spin_round_error": spin_round_error(),
        "ddp_loss_difference": ddp_loss_difference(),
        "memory_estimate_error": json.loads(ESTIMATE.read_text())["memory_estimate_error"],
    }


def rows(study: Record) -> Iterator[dict[str, object]]:
    """One row for each method of each task: means with intervals over the seeds, and DPR minus the method, paired.

    `rewards`: AUROCs of the reward that its training left, by signal; empty if it left none of its own.
    """
    for regime, methods in study["summary"].items():
        primary = study["primary"][regime]["differences"]
        for method, figures in methods.items():
            minus = {f"dpr_minus_it_{metric}": found.get(method) for metric, found in primary.items()}
            rewards = study["rewards"][regime].get(method, {})
            yield {"task": regime, "method": method, **figures, **minus, "rewards": rewards}


def ddp_loss_difference() -> float:
    """The largest relative difference of a loss, over the first 20 steps of SFT, between two processes and one."""
    with tempfile.TemporaryDirectory() as folder:
        alone, shared = Path(folder, "one"), Path(folder, "two")
        subprocess.run([sys.executable, "-m", PROGRAM, *sft(alone, batch_size=8)], check=True)
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        subprocess.run([sys.executable, *launcher, "-m", PROGRAM, *sft(shared, batch_size=4)], check=True)
        pairs = zip(losses(alone), losses(shared), strict=True)
        return max(abs(two / one - 1) for one, two in pairs)


def sft(folder: Path, batch_size: int) -> list[str]:
    """A small run in float32 of exactly so many steps; `batch_size` is that of each process."""
    return [
        *("sft", "arithmetic_sft_tiny", f"output_dir={folder}", f"batch_size={batch_size}", "threads=1"),
        "data={source: arithmetic, held_out_fraction: 0, arithmetic: {demonstrations: 80, digits: 2}}",
        *("eval_every_steps=null", "log_every_steps=1", f"max_steps={COMPARED_STEPS}"),
    ]


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    if len(found) != COMPARED_STEPS:
        raise RuntimeError(f"{folder} logged {len(found)} losses, not {COMPARED_STEPS}")
    return found
