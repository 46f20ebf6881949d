"""Measures and writes bench/results/evaluation.json: `python -m bench.evaluation [--only STAGE]`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import Json, write_stage
from bench.evaluation import formats, harness, judging, planted, report_page

RESULTS = Path("bench/results/evaluation.json")
STAGES: dict[str, Callable[[], tuple[Json, Json]]] = {  # each returns figures and details
    "judge": judging.scripted,
    "judge_server": judging.real_server,
    "formats": formats.measure,
    "lm_eval": harness.measure,
    "planted": planted.measure,
    "report": report_page.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all requested stages are measured and written."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.add_argument("--only", choices=list(STAGES), action="append", metavar="STAGE", help=", ".join(STAGES))
    wanted = parser.parse_args(arguments).only or list(STAGES)
    at = commit()  # read first: the results of this run make the checkout dirty
    train_pair()
    for name in wanted:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures, details = STAGES[name]()
        write_stage(RESULTS, "stages", name, {"figures": figures, "commit": at, **details})
        print(json.dumps(figures, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
