"""Commit, hardware and versions. Every results file records them."""

import os
import platform
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit, versions


def circumstances() -> dict[str, object]:
    """Commit, hardware and versions."""
    return {
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
