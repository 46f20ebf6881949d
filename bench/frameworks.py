"""Drives other programs' own code with a real service; writes bench/results/frameworks.json.

Each program has tests that import the installed package: TRL in this environment, verl in `.venv-verl` and Ray in
`.venv-ray` (`make test-frameworks` makes them). A tiny chat model and its half-way reference are trained and served for
them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dense_reward_trainer.runs.local_service import free_port, serving_run

from bench.circumstances import circumstances

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "frameworks.json"
RAY = ROOT / ".venv-ray" / "bin" / "python"
VERL = ROOT / ".venv-verl" / "bin" / "python"
PATHS = os.pathsep.join(str(ROOT / package) for package in ("service", "trainer", "tests/support"))


@dataclass(frozen=True, slots=True)
class Driven:
    """What was run of one program. `passed`, `failed`: its tests."""

    name: str
    version: str
    how: str
    passed: int
    failed: int


def main() -> int:
    """Returns exit code 0 if every test has passed, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "pair"
        train = ["-m", "dense_reward_trainer.cli", "sft", "arithmetic_sft_tiny", f"output_dir={run}", "renderer=chat"]
        size = ["scratch.vocabulary=400", "scratch.max_position_embeddings=128"]
        subprocess.run([sys.executable, *train, *size], check=True)
        with serving_run(run, free_port()) as (_, url):
            place = {"DENSE_REWARD_URL": url, "DENSE_REWARD_SFT": str(run / "checkpoints" / "sft")}
            found = [
                driven(
                    "trl",
                    Path(sys.executable),
                    "its trainers, three steps; two processes",
                    ["tests/trainer/integrations"],
                ),
                driven("ray", RAY, "bulk scoring with two local workers, one killed", ["tests/frameworks/test_ray.py"]),
                driven(
                    "verl", VERL, "its agent loop, storage and advantages", ["tests/frameworks/test_verl.py"], place
                ),
            ]
    RESULT.write_text(json.dumps({"frameworks": [asdict(one) for one in found], **circumstances()}, indent=2) + "\n")
    for one in found:
        print(f"{one.name} {one.version}: {one.passed} passed, {one.failed} failed")
    return int(any(one.failed or not one.passed for one in found))


def driven(name: str, python: Path, how: str, tests: Sequence[str], variables: dict[str, str] | None = None) -> Driven:
    """Runs tests in the environment of a program, outside this project's own settings of pytest."""
    own = [] if python == Path(sys.executable) else ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command = [str(python), "-m", "pytest", "-q", *own, *(str(ROOT / test) for test in tests)]
    surroundings = os.environ | (variables or {}) | ({} if not own else {"PYTHONPATH": PATHS})
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests of {name} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(done.stdout[-2000:] if done.returncode else f"{name}: passed")
    return Driven(name, version(python, name), how, counted(done.stdout, "passed"), counted(done.stdout, "failed"))


def version(python: Path, name: str) -> str:
    asked = f"from importlib.metadata import version; print(version('{name}'))"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def counted(output: str, word: str) -> int:
    """How many tests pytest's last line counts as this."""
    matched = re.search(rf"(\d+) {word}", output.strip().splitlines()[-1])
    return int(matched[1]) if matched else 0


if __name__ == "__main__":
    sys.exit(main())
