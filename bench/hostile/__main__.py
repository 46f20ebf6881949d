"""Measures and writes bench/results/hostile.json: `python -m bench.hostile [--only STAGE]`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import circumstances
from bench.hostile import bodies, checkpoints, secrets, signals, sockets

Json = dict[str, object]
RESULTS = Path("bench/results/hostile.json")
STAGES: dict[str, Callable[[], tuple[Json, Json]]] = {  # each returns figures and details
    "bodies": bodies.measure,
    "sockets": sockets.measure,
    "checkpoints": checkpoints.measure,
    "signals": signals.measure,
    "secrets": secrets.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all requested stages are measured and written."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.add_argument("--only", choices=list(STAGES), action="append", metavar="STAGE", help=", ".join(STAGES))
    at = commit()  # read first: the results of this run make the checkout dirty
    for name in parser.parse_args(arguments).only or STAGES:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures, details = STAGES[name]()
        _write(name, figures, details, at)
        print(json.dumps(figures, indent=2), flush=True)
    return 0


def _write(name: str, figures: Json, details: Json, at: str | None) -> None:
    """Adds a stage to the file, with its commit. Keeps other stages."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stages = results.get("stages", {}) | {name: {"figures": figures, "commit": at, **details}}
    keys = {key: value for stage in stages.values() for key, value in stage["figures"].items()}
    record = {**keys, "stages": stages, **circumstances(), "commit": at}
    RESULTS.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
