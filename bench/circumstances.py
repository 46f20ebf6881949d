"""Commit, hardware and versions. Every results file records them."""

import json
import os
import platform
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit, versions

Json = dict[str, object]


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


def processor() -> str:
    """The processor's name, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
