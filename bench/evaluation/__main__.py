"""Measures and writes bench/results/evaluation.json: `python -m bench.evaluation [--only STAGE]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dense_reward_trainer.jobs.demo import train_pair

from bench.circumstances import Stages, chosen, measure_stages
from bench.evaluation import formats, harness, judging, planted, report_page

RESULTS = Path("bench/results/evaluation.json")
STAGES: Stages = {
    "judge": judging.scripted,
    "judge_server": judging.real_server,
    "formats": formats.measure,
    "lm_eval": harness.measure,
    "planted": planted.measure,
    "report": report_page.measure,
}
WITHOUT_MODELS = {"judge", "formats"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all requested stages are measured and written."""
    names = chosen(STAGES, __doc__, arguments)
    if not WITHOUT_MODELS.issuperset(names):
        train_pair()
    measure_stages(RESULTS, STAGES, names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
