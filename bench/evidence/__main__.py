"""Runs the regimes study and writes bench/results/evidence.json: `python -m bench.evidence [--full] [--finished]`.

Finished parts are reused, so an interrupted run continues; `study_commits` are those at which its jobs ran.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.studies.regimes.config import SweepConfig

from bench.circumstances import circumstances

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
MIXED = "mixed"
Record = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once the results are written, or the code of the study if it fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all regimes and figures: nights of CPU time")
    parser.add_argument("--finished", action="store_true", help="run nothing: the figures of what is finished so far")
    options = parser.parse_args(arguments)
    recipe = "evidence_full_sweep" if options.full else "evidence_sweep"
    config = load_config(SweepConfig, config_path(recipe))
    command = [sys.executable, "-m", "dense_reward_trainer.cli", "sweep", recipe]
    command += ["finished_only=true"] if options.finished else []
    done = subprocess.run(command, check=False)
    if done.returncode:
        return done.returncode
    study = json.loads((config.output_dir / "sweep.json").read_text())
    keys = gain_keys(study["primary"].get(MIXED)) | boundary_keys(study["boundary"]) | preview_keys(study["preview"])
    record = {**keys, "study": study, "study_commits": study["commits"], **circumstances()}
    name = "evidence_full" if options.full else "evidence"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    PICTURES.mkdir(exist_ok=True)
    for picture in sorted(config.output_dir.glob("*.png")):
        shutil.copy(picture, PICTURES / f"{name}_{picture.name}")
    print(json.dumps(keys, indent=2))
    return 0


def gain_keys(primary: Record | None) -> dict[str, float | str]:
    """DPR with the base as reference minus the best control, on demonstrators of mixed quality; none if unfinished.

    `..._over_one_model`: minus the best of the controls that, unlike the reward, need the SFT model alone.
    """
    keys: dict[str, float | str] = {}
    if primary is None:
        return keys
    for metric, name in (("greedy_accuracy", "greedy"), ("sampled_accuracy", "sampled")):
        for kind, suffix in (("best_control", ""), ("best_of_one_model", "_over_one_model")):
            control = primary[kind][metric]
            found = primary["differences"][metric][control]["interval"]
            keys |= {
                f"regime_a_{name}_gain{suffix}": found["value"],
                f"regime_a_{name}_gain{suffix}_ci_low": found["low"],
                f"regime_a_{name}_control{suffix}": control,
            }
    return keys


def boundary_keys(places: Record) -> dict[str, float]:
    """The gain where the demonstrations are furthest below the model that SFT starts from, if there are two places."""
    if len(places) < 2:
        return {}
    worst = min(places.values(), key=lambda one: float(one["shift"]["value"]))
    return {"boundary_gain": worst["gain"]["value"], "boundary_gain_ci_high": worst["gain"]["high"]}


def preview_keys(previews: Sequence[Record]) -> dict[str, int]:
    """How many verdicts of the job preview agree with what training then did."""
    unknown = sum(one["verdict"]["verdict"] == "unknown" for one in previews)
    right = sum(one["right"] for one in previews)
    return {"preview_right": right, "preview_runs": len(previews), "preview_unknown": unknown}


if __name__ == "__main__":
    sys.exit(main())
