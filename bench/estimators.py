"""Runs the study of DPR's options and writes bench/results/estimators.json: `python -m bench.estimators`.

The study compares the options on a task whose optimum is known. Finished runs are reused, so an interrupted study
continues; a study of another commit is reported.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.credit.paired import paired_interval
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.options.config import EstimatorsConfig

from bench.circumstances import circumstances
from bench.credit import commit_of

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
TUNED, PLAIN = "tuned", "plain"
RATIO = "sample_ratio_to_half_gap"


class OutcomeJson(TypedDict):
    """What the study writes for one set of options; lists have one entry for each seed."""

    gap_closed: list[float]
    tokens_to_half: list[float | None]


class IntervalJson(TypedDict):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class DifferenceJson(TypedDict):
    """Gap closed minus that of the plain option, within a seed."""

    interval: IntervalJson
    p_holm: float


def main() -> int:
    """Returns exit code 0 once the results are written."""
    folder = load_config(EstimatorsConfig, config_path("estimators")).output_dir
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", "estimators", "estimators"], check=True)
    study = json.loads((folder / "estimators.json").read_text())
    keys = gap_keys(study["outcomes"]) | difference_keys(study["differences"]) | fastest_key(study["tuning"])
    record = {**keys, "estimators": study, "commits": {str(folder): commit_of(folder)}, **circumstances()}
    (RESULTS / "estimators.json").write_text(json.dumps(record, indent=2) + "\n")
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(folder / "estimators.png", PICTURES / "estimators.png")
    print(json.dumps(keys, indent=2))
    return 0


def gap_keys(outcomes: Mapping[str, OutcomeJson]) -> dict[str, float | None]:
    """Mean gap closed over seeds; and scored tokens to half of the gap, the plain option's divided by the tuned one's.

    The ratio is the geometric mean over the seeds, with its 95 % interval (Student's t of its logarithm); null if a run
    never closed half of the gap. The keys `gap_closed_best` (tuned) and `gap_closed_paper` (plain) keep the names that
    they have in the files of earlier commits.
    """
    tuned, plain = outcomes[TUNED], outcomes[PLAIN]
    logs = [
        None if slow is None or fast is None else math.log(slow / fast)
        for slow, fast in zip(plain["tokens_to_half"], tuned["tokens_to_half"], strict=True)
    ]
    known = [ratio for ratio in logs if ratio is not None]
    found = paired_interval(known) if len(known) == len(logs) else None
    return {
        "gap_closed_best": paired_interval(tuned["gap_closed"]).value,
        "gap_closed_paper": paired_interval(plain["gap_closed"]).value,
        RATIO: None if found is None else math.exp(found.value),
        f"{RATIO}_ci_low": None if found is None else math.exp(found.low),
        f"{RATIO}_ci_high": None if found is None else math.exp(found.high),
    }


def difference_keys(differences: Mapping[str, DifferenceJson]) -> dict[str, float | None]:
    """Gap closed by the tuned option minus that of the plain one, paired over seeds."""
    found = differences[TUNED]
    return {
        "gap_closed_tuned_minus_plain": found["interval"]["value"],
        "gap_closed_tuned_minus_plain_ci_low": found["interval"]["low"],
        "gap_closed_tuned_minus_plain_ci_high": found["interval"]["high"],
        "gap_closed_tuned_minus_plain_p_holm": found["p_holm"],
    }


def fastest_key(tuning: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """The same ratio on the tuning seed alone, each at the learning rate that reaches half of the gap fastest.

    The study chooses the rate that closes most of the gap at the end. Many rates then look alike, but the rate
    determines how soon half of the gap is closed.
    """
    fastest = {
        name: min((found["tokens_to_half"] for found in tuning[name].values() if found["tokens_to_half"]), default=None)
        for name in (TUNED, PLAIN)
    }
    slow, fast = fastest[PLAIN], fastest[TUNED]
    return {f"{RATIO}_fastest_rates": None if slow is None or fast is None else slow / fast}


if __name__ == "__main__":
    sys.exit(main())
