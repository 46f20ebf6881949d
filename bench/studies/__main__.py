"""Runs a study of the trainer and writes bench/results/NAME.json: `python -m bench.studies NAME`.

evidence: when does training on the reward help, and when does it hurt (evidence_full: all regimes; evidence_few: few
and noisy demonstrations). figures: the discount, and the place of the reference. methods: what to do after SFT.
large_scale_tiny: the study of docs/large_scale.md at the size of a CPU. Finished parts are reused, so an interrupted
run continues; `study_commits` are those at which the jobs ran. With `--only REGIME`, the other regimes stay in the
file as they are, and `kept` says where they come from.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.plot import plot_policies

from bench.circumstances import circumstances
from bench.studies import evidence, large_scale_tiny, methods
from bench.studies.evidence import Record

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")


# What a study finds for each regime.
BY_REGIME = ("tuning", "cells", "summary", "primary", "boundary", "rewards")


def keep_others(study: dict[str, Any], earlier: Record) -> dict[str, Record]:
    """Add the regimes of an earlier file to a study that ran others; returns where each comes from, by name.

    The verdicts of `preview` are added too; CPU hours and commits of the jobs stay those of the study alone.
    """
    ran = max(earlier["study_commits"], key=earlier["study_commits"].get)
    source = {"commit": ran, "machine": earlier["machine"], "versions": earlier["versions"]}
    kept: dict[str, Record] = {regime: source for regime in earlier["study"]["cells"] if regime not in study["cells"]}
    kept |= {regime: source for regime, source in earlier.get("kept", {}).items() if regime in kept}
    for key in BY_REGIME:
        study[key] |= {regime: found for regime, found in earlier["study"][key].items() if regime in kept}
    study["preview"] += [one for one in earlier["study"]["preview"] if one["regime"] in kept]
    study["config"]["regimes"] |= {name: earlier["study"]["config"]["regimes"][name] for name in kept}
    return kept


def _no_keys(_: Record) -> dict[str, object]:
    return {}


# name -> the shipped recipe, and the figures that stand at the top of its file
STUDIES: Mapping[str, tuple[str, Callable[[Record], Mapping[str, object]]]] = {
    "evidence": ("evidence_sweep", evidence.keys),
    "evidence_full": ("evidence_full_sweep", evidence.keys),
    "evidence_few": ("evidence_few_sweep", _no_keys),
    "figures": ("figures_sweep", _no_keys),
    "methods": ("methods", methods.keys),
    "large_scale_tiny": ("large_scale_sweep_tiny", large_scale_tiny.keys),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once the results are written, or the code of the study if it fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--finished", action="store_true", help="run nothing: the figures of what is finished so far")
    parser.add_argument("--only", action="append", metavar="REGIME", help="run this regime alone (may be repeated)")
    parser.add_argument(
        "--source", default="openai/gsm8k:main@train", help="GSM8K's training split, for large_scale_tiny"
    )
    options = parser.parse_args(arguments)
    recipe, keys_of = STUDIES[options.name]
    command = [sys.executable, "-m", "dense_reward_trainer.cli", "sweep", recipe]
    overrides = ["finished_only=true"] * options.finished + [f"only={json.dumps(options.only)}"] * bool(options.only)
    if options.name == "large_scale_tiny":
        overrides += large_scale_tiny.overrides(options.source)
        if not options.finished:
            large_scale_tiny.prepare(options.source)
    done = subprocess.run([*command, *overrides], check=False)
    if done.returncode:
        return done.returncode
    folder = load_config(SweepConfig, config_path(recipe)).output_dir
    study = json.loads((folder / "sweep.json").read_text())
    file, kept = RESULTS / f"{options.name}.json", {}
    if options.only and file.is_file():
        kept = keep_others(study, json.loads(file.read_text()))
        figures = {name: [CellFigures.of(cell) for cell in cells] for name, cells in study["cells"].items()}
        plot_policies(figures, folder / "sweep")
    keys = keys_of(study)
    record = {**keys, "study": study, "study_commits": study["commits"], "kept": kept, **circumstances()}
    file.write_text(json.dumps(record, indent=1) + "\n")
    PICTURES.mkdir(exist_ok=True)
    for picture in sorted(folder.glob("*.png")):
        shutil.copy(picture, PICTURES / f"{options.name}_{picture.name}")
    print(json.dumps({name: one for name, one in keys.items() if not isinstance(one, list)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
