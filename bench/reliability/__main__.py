"""Measures and writes bench/results/reliability.json: `python -m bench.reliability [EXPERIMENT ...]`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import write_stage
from bench.reliability import bad_clients, overload, reload, stops
from bench.reliability.load import Json
from bench.reliability.server import LOAD_CORE, pin

RESULTS = Path("bench/results/reliability.json")
EXPERIMENTS: dict[str, Callable[[], tuple[Json, Json]]] = {  # each returns figures and details
    "overload": overload.measure_overload,
    "sigterm": stops.measure_sigterm,
    "dpr_kill": stops.measure_dpr_kill,
    "hangups": bad_clients.measure_hangups,
    "reload": reload.measure_reload,
    "fuzz": bad_clients.measure_fuzz,
    "slow_sockets": bad_clients.measure_slow_sockets,
    "soak": overload.measure_soak,
}
LONG = "soak"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all requested experiments are measured and written."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=f"default: all but {LONG}")
    names = parser.parse_args(arguments).names or [name for name in EXPERIMENTS if name != LONG]
    unknown = sorted(set(names) - EXPERIMENTS.keys())
    if unknown:
        parser.error(f"unknown experiment {unknown[0]!r}; choose from {', '.join(EXPERIMENTS)}")
    train_pair()
    at = commit()  # read first: the results of this run make the checkout dirty
    pin(0, LOAD_CORE)
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures, details = EXPERIMENTS[name]()
        write_stage(RESULTS, "experiments", name, {"figures": figures, "commit": at, **details})
        print(json.dumps(figures, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
