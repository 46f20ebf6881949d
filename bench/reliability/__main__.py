"""`python -m bench.reliability [EXPERIMENT ...]`: measures and writes bench/results/reliability.json."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.run_folder import commit

from bench.credit import circumstances
from bench.reliability import dpr_kill, fuzz, hangups, overload, reload, sigterm, slow_sockets, soak
from bench.reliability.load import Json
from bench.reliability.server import LOAD_CORE, pin

RESULTS = Path("bench/results/reliability.json")
EXPERIMENTS: dict[str, Callable[[], tuple[Json, Json]]] = {
    "overload": overload.measure,
    "sigterm": sigterm.measure,
    "dpr_kill": dpr_kill.measure,
    "hangups": hangups.measure,
    "reload": reload.measure,
    "fuzz": fuzz.measure,
    "slow_sockets": slow_sockets.measure,
    "soak": soak.measure,
}
LONG = "soak"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 once all that was asked for is measured and written."""
    parser = argparse.ArgumentParser(prog="bench.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=f"all but {LONG} where left out")
    names = parser.parse_args(arguments).names or [name for name in EXPERIMENTS if name != LONG]
    unknown = sorted(set(names) - EXPERIMENTS.keys())
    if unknown:
        parser.error(f"no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    train_pair()
    at = commit()  # before its own results change the checkout
    pin(0, LOAD_CORE)
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures, behind = EXPERIMENTS[name]()
        _write(name, figures, behind, at)
        print(json.dumps(figures, indent=2), flush=True)
    return 0


def _write(name: str, figures: Json, behind: Json, at: str | None) -> None:
    """Beside those of other experiments, each with the commit that it was measured at."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    experiments = results.get("experiments", {}) | {name: {"figures": figures, "commit": at, **behind}}
    keys = {key: value for experiment in experiments.values() for key, value in experiment["figures"].items()}
    told = {**keys, "experiments": experiments, **circumstances(), "commit": at}
    RESULTS.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
