"""Commit, hardware and versions. Every results file records them."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit, versions

Json = dict[str, object]
Stages = Mapping[str, Callable[[], tuple[Json, Json]]]
"""Name -> what measures it and returns figures and details."""


def circumstances() -> dict[str, object]:
    """Commit, hardware and versions."""
    return {
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
    }


def write_stage(file: Path, group: str, name: str, stage: Json) -> None:
    """Add a stage to a results file that keeps the others, and the `figures` of all stages to the top of that file."""
    results = json.loads(file.read_text()) if file.exists() else {}
    stages = results.get(group, {}) | {name: stage}
    keys = {key: value for stage in stages.values() for key, value in stage["figures"].items()}
    record = {**keys, group: stages, **circumstances(), "commit": stage["commit"]}
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def chosen(stages: Stages, description: str | None, arguments: Sequence[str] | None) -> list[str]:
    """The stages that the command line names with --only; all, if it names none."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=list(stages), action="append", metavar="STAGE", help=", ".join(stages))
    return parser.parse_args(arguments).only or list(stages)


def measure_stages(file: Path, stages: Stages, names: Sequence[str]) -> None:
    """Measures stages one by one, and writes each to the results file as it ends."""
    at = commit()  # read first: the results of this run make the checkout dirty
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures, details = stages[name]()
        write_stage(file, "stages", name, {"figures": figures, "commit": at, **details})
        print(json.dumps(figures, indent=2), flush=True)


def processor() -> str:
    """The processor's name, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
