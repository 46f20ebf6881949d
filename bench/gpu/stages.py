"""One stage: `python -m bench.gpu.stages NAME FILE` writes its figures, with what they were measured on, to FILE."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole

from bench.gpu import attention, graphs, heads, memory, pairs, service, speed
from bench.gpu.machine import Machine, Record

Stage = Callable[[Machine, Record], None]
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "vllm")


def _tests(machine: Machine, record: Record) -> None:
    """The test suite's own tests that need a GPU."""
    del machine
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *_files()]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(process.stdout[-3000:])
    record(summary=process.stdout.strip().splitlines()[-1], exit_code=process.returncode)
    if process.returncode not in (0, 5):  # 5: no test was selected
        raise SystemExit(1)


def _files() -> list[str]:
    """The test files with such tests: others may need packages that are not there."""
    return sorted(str(path) for path in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())


STAGES: Mapping[str, Stage] = {
    "tests": _tests,
    "attention": attention.stage,
    "heads": heads.stage,
    "graphs": graphs.stage,
    "pairs": pairs.stage,
    "profile": speed.profile,
    "speed_15b": speed.speed_15b,
    "variants": speed.variants,
    "speed_7b": speed.speed_7b,
    "unequal": speed.unequal,
    "memory": memory.stage,
    "service": service.stage,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    machine = Machine(torch.device(options.device), options.tiny)
    figures: dict[str, object] = {"commit": _commit(), "device": machine.name, "versions": _versions()}

    def record(**found: object) -> None:
        figures.update(found)
        write_whole(options.file, json.dumps(figures).encode())
        print(json.dumps(found), flush=True)

    STAGES[options.name](machine, record)


def _commit() -> str:
    """The commit of the files; where there is no git folder, what the environment says."""
    stated = os.environ.get("MEASURED_COMMIT")
    if stated:
        return stated
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, check=False)
    return found.stdout.decode().strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
