"""Tests and measures the engine on a GPU, one stage after another: `python -m bench.gpu`, from the repository's root.

Needs no git folder, no network and no model files: models are made on the device with random weights. Every stage is a
process with a time limit, and its figures are written when it ends, so a stage that fails or hangs costs only itself.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole

from bench.gpu.stages import STAGES

RESULTS = Path("bench/results/gpu_day.json")
LIMIT_S = 480.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 if every stage ended and found nothing wrong."""
    options = _parser().parse_args(arguments)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    failed = []
    for name in options.stage or STAGES:
        print(f"{name} ...", flush=True)
        found = _run(name, options)
        print(f"{name}: {found['state']} in {found['seconds']:.0f} s", flush=True)
        if found["state"] != "done":
            failed.append(name)
            print(found["log"], flush=True)
        results[name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, (json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {options.out}" + (f"; not done: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _run(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Run one stage. `state`: done, failed (see `log`) or too long."""
    file = options.out.with_name(f".{name}.json")
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu.stages", name, str(file), "--device", options.device]
    command += ["--tiny"] if options.tiny else []
    started_s = time.monotonic()
    try:
        process = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=options.limit_s, check=False
        )
        state, log = "done" if process.returncode == 0 else "failed", process.stdout
    except subprocess.TimeoutExpired as error:
        state, log = "too long", error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
    figures = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    return {"state": state, "seconds": time.monotonic() - started_s, **figures, "log": log[-4000:]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--stage", action="append", choices=STAGES, metavar="NAME", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that gets the figures; other stages are kept")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds after which a stage is ended")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tests that every stage runs")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches: a test, not a measurement")
    return parser


if __name__ == "__main__":
    sys.exit(main())
