"""Runs both studies of the dense reward and writes bench/results/estimators.json: `python -m bench.estimators`.

One compares DPR's options on a task whose optimum is known, the other compares DPR with its alternatives on additions.
Finished parts are reused, so an interrupted run continues; studies of another commit are reported.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.studies.compare_options_config import EstimatorsConfig
from dense_reward_trainer.studies.regimes_config import SweepConfig

from bench.circumstances import circumstances
from bench.credit import commit_of

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
BEST, PAPER = "best", "paper"


def main() -> int:
    """Returns exit code 0 once the results of both studies are written."""
    estimators = load_config(EstimatorsConfig, config_path("estimators"))
    sweep = load_config(SweepConfig, config_path("regimes_sweep"))
    for job, recipe in (("estimators", "estimators"), ("sweep", "regimes_sweep")):
        subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", job, recipe], check=True)
    study = json.loads((estimators.output_dir / "estimators.json").read_text())
    regimes = json.loads((sweep.output_dir / "sweep.json").read_text())
    commits = {str(folder): commit_of(folder) for folder in (estimators.output_dir, sweep.output_dir)}
    keys = (
        gap_keys(study["outcomes"])
        | fastest_key(study["tuning"])
        | gain_keys(next(iter(regimes["summary"].values())), sweep.matched)
    )
    record = {**keys, "estimators": study, "regimes": regimes, "commits": commits, **circumstances()}
    (RESULTS / "estimators.json").write_text(json.dumps(record, indent=2) + "\n")
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(estimators.output_dir / "estimators.png", PICTURES / "estimators.png")
    shutil.copy(sweep.output_dir / "sweep.png", PICTURES / "regimes.png")
    print(json.dumps(keys, indent=2))
    return 0


def gap_keys(outcomes: Mapping[str, Mapping[str, list[float | None]]]) -> dict[str, float | None]:
    """Mean gap closed over seeds; and scored tokens to half of the gap, the paper's divided by the best options'."""
    best, paper = outcomes[BEST], outcomes[PAPER]
    ratios = [
        None if slow is None or fast is None else slow / fast
        for slow, fast in zip(paper["tokens_to_half"], best["tokens_to_half"], strict=True)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "gap_closed_best": mean(best["gap_closed"]),
        "gap_closed_paper": mean(paper["gap_closed"]),
        "sample_ratio_to_half_gap": median(known) if len(known) == len(ratios) else None,
    }


def fastest_key(tuning: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """The same ratio on the tuning seed, each at the learning rate that reaches half of the gap fastest.

    The studies choose the rate that closes most of the gap at the end. All of the paper's rates then look alike, but
    the rate determines how soon half of the gap is closed.
    """
    fastest = {
        name: min((found["tokens_to_half"] for found in tuning[name].values() if found["tokens_to_half"]), default=None)
        for name in (BEST, PAPER)
    }
    slow, fast = fastest[PAPER], fastest[BEST]
    return {"sample_ratio_to_half_gap_fastest_rates": None if slow is None or fast is None else slow / fast}


def gain_keys(columns: Mapping[str, Mapping[str, Mapping[str, float]]], column: str) -> dict[str, float | None]:
    """Gain of the best DPR over the SFT model, on additions."""
    gain, length = columns[column]["sampled_accuracy_gain"], columns[column]["length_tokens_gain"]
    return {
        "sampled_accuracy_gain": gain["value"],
        "sampled_accuracy_gain_ci_low": gain["low"],
        "length_drift": length["value"] / columns["sft"]["length_tokens"]["value"],
    }


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


if __name__ == "__main__":
    sys.exit(main())
