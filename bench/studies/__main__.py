"""Runs a study of the trainer and writes bench/results/NAME.json: `python -m bench.studies NAME [--finished]`.

evidence: when does training on the reward help, and when does it hurt (evidence_full: all regimes; evidence_few: few
and noisy demonstrations). figures: the discount, and the place of the reference. methods: what to do after SFT.
Finished parts are reused, so an interrupted run continues; `study_commits` are those at which the jobs ran.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.config import SweepConfig

from bench.circumstances import circumstances
from bench.studies import evidence, methods
from bench.studies.evidence import Record

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")


def _no_keys(_: Record) -> dict[str, object]:
    return {}


# name -> the shipped recipe, and the figures that stand at the top of its file
STUDIES: Mapping[str, tuple[str, Callable[[Record], Mapping[str, object]]]] = {
    "evidence": ("evidence_sweep", evidence.keys),
    "evidence_full": ("evidence_full_sweep", evidence.keys),
    "evidence_few": ("evidence_few_sweep", _no_keys),
    "figures": ("figures_sweep", _no_keys),
    "methods": ("methods", methods.keys),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once the results are written, or the code of the study if it fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--finished", action="store_true", help="run nothing: the figures of what is finished so far")
    options = parser.parse_args(arguments)
    recipe, keys_of = STUDIES[options.name]
    command = [sys.executable, "-m", "dense_reward_trainer.cli", "sweep", recipe]
    done = subprocess.run([*command, *(["finished_only=true"] if options.finished else [])], check=False)
    if done.returncode:
        return done.returncode
    folder = load_config(SweepConfig, config_path(recipe)).output_dir
    study = json.loads((folder / "sweep.json").read_text())
    keys = keys_of(study)
    record = {**keys, "study": study, "study_commits": study["commits"], **circumstances()}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    PICTURES.mkdir(exist_ok=True)
    for picture in sorted(folder.glob("*.png")):
        shutil.copy(picture, PICTURES / f"{options.name}_{picture.name}")
    print(json.dumps({name: one for name, one in keys.items() if not isinstance(one, list)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
