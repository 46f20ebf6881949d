"""Measures and writes bench/results/hostile.json: `python -m bench.hostile [--only STAGE]`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import Json, write_stage
from bench.hostile import bodies, checkpoints, secrets, signals, sockets

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
        write_stage(RESULTS, "stages", name, {"figures": figures, "commit": at, **details})
        print(json.dumps(figures, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
