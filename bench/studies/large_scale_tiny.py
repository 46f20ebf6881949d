"""The base model and its samples for the study of docs/large_scale.md at the size of a CPU.

`python -m bench.studies large_scale_tiny --source FILE`; FILE is GSM8K's training split.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.studies.evidence import Record

BASE, SAMPLES = Path("runs/large_scale_tiny_base"), Path("runs/large_scale_tiny_samples")
SCRATCH = (
    "{vocabulary: 1024, hidden_size: 128, layers: 4, heads: 4, intermediate_size: 384, max_position_embeddings: 768}"
)
PROBLEMS = 1000
"""Those that the sweep reads. At 128 tokens, 30 % of the base's answers are cut off, and cannot be demonstrations."""


def overrides(source: str) -> list[str]:
    """What the sweep's recipe leaves to the command line, and the seeds that were run."""
    return [f"regimes.gsm8k_50.task.train.source={source}", "seeds=[20, 21]"]


def jobs(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments of both jobs: training the base, and sampling it."""
    return (
        (
            *("sft", "gsm8k_sft", f"data.source={source}", "data.skip_last=0", "data.last=3000", f"scratch={SCRATCH}"),
            *("milestones={}", "epochs=2", "eval_every_steps=null", "threads=1", f"output_dir={BASE}"),
        ),
        (
            *("sample", "sample_full", f"policy={BASE}/checkpoints/sft", f"prompts={source}", f"limit={PROBLEMS}"),
            *("max_new_tokens=128", "batch_size=64", "device=cpu", "precision=float32", "threads=1"),
            f"output_dir={SAMPLES}",
        ),
    )


def prepare(source: str) -> None:
    """Trains the base, samples it, and leaves out answers that were cut off.

    Finished parts are not repeated. Raises CalledProcessError if a job fails.
    """
    for folder, arguments in zip((BASE, SAMPLES), jobs(source), strict=True):
        _run(folder, arguments)
    lines = (SAMPLES / "samples.jsonl").read_text().splitlines(keepends=True)
    (SAMPLES / "finished.jsonl").write_text("".join(line for line in lines if json.loads(line)["finished"]))


def keys(study: Record) -> dict[str, object]:
    """DPR with the base as reference minus the best control, by metric, and the CPU hours of all parts."""
    primary = study["primary"]["gsm8k_50"]
    found: dict[str, object] = {}
    for metric, control in primary["best_control"].items():
        found |= {
            f"{metric}_best_control": control,
            f"{metric}_gain": primary["differences"][metric][control]["interval"],
        }
    before = sum(float(line) for folder in (BASE, SAMPLES) for line in _cpu_times(folder).read_text().split())
    return {**found, "cpu_hours_of_base_and_samples": before / 3600, "cpu_hours_of_the_sweep": study["cpu_hours"]}


def _cpu_times(folder: Path) -> Path:
    """CPU seconds, one line for each time that the job was run."""
    return folder / "cpu_s.txt"


def _run(folder: Path, arguments: Sequence[str]) -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", *arguments], check=True)
    after = os.times()
    spent_s = after.children_user + after.children_system - before.children_user - before.children_system
    with _cpu_times(folder).open("a") as file:
        file.write(f"{spent_s:.1f}\n")
