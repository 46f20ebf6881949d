"""Drives other programs' own code with a real service; writes bench/results/frameworks.json.

Each program has tests that import its own code: TRL in this environment, verl in `.venv-verl`, Ray in `.venv-ray`, the
others in `.frameworks/venv` from a copy of their source (framework_sources.py); `make test-frameworks` makes the
environments. A tiny chat model and its half-way reference are trained and served for them. What cannot be installed or
fetched has the error in its row, and the exit code is 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from dense_reward_trainer.runs.local_service import free_port, serving_run

from bench.circumstances import circumstances
from bench.framework_sources import FOLDER, SOURCES, TEACHER_CLIENTS, Source, fetched

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "frameworks.json"
RAY = ROOT / ".venv-ray" / "bin" / "python"
VERL = ROOT / ".venv-verl" / "bin" / "python"
VERL_CODE, VERL_TESTS = "its agent loop, storage and advantages", "tests/frameworks/test_verl.py"
TEACHER_CODE = "the clients of TRL, prime-rl, slime and miles that ask a teacher for log-probs"
TEACHER_VERSIONS = ", ".join(f"{source.name} {source.version}" for source in TEACHER_CLIENTS)
OTHERS = FOLDER / "venv" / "bin" / "python"
RAY_CODE = "bulk scoring with two local workers, and two replicas of Ray Serve; one of each killed"
RAY_TESTS = ["tests/frameworks/test_ray.py", "tests/frameworks/test_ray_serve.py"]
PATHS = os.pathsep.join(str(ROOT / package) for package in ("service", "trainer", "tests/support"))


@dataclass(frozen=True, slots=True)
class Driven:
    """What was run of one program. `passed`, `failed`: its tests. `figures`: what they measured, by name.

    `error`: why nothing was run; None if its tests ran.
    """

    name: str
    version: str
    how: str
    passed: int
    failed: int
    figures: dict[str, list[float]]
    error: str | None = None


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
                tried("ray", "2.60.0", RAY_CODE, lambda: driven("ray", RAY, RAY_CODE, RAY_TESTS)),
                tried("verl", "0.9.1", VERL_CODE, lambda: driven("verl", VERL, VERL_CODE, [VERL_TESTS], place)),
                *(driven_from_source(source, place) for source in SOURCES),
                tried("teacher clients", TEACHER_VERSIONS, TEACHER_CODE, driven_teachers),
            ]
    figures = found[0].figures
    results = {
        "trl_loss_difference": max(figures["trl_loss_difference"]),
        "trl_steps": min(figures["trl_steps"]),
        "frameworks": [asdict(one) for one in found],
    }
    RESULT.write_text(json.dumps({**results, **circumstances()}, indent=2) + "\n")
    for one in found:
        print(f"{one.name} {one.version}: {one.passed} passed, {one.failed} failed", one.error or "")
    return int(any(one.failed or not one.passed for one in found))


def driven_from_source(source: Source, place: dict[str, str]) -> Driven:
    """Runs the tests of a program whose source is fetched."""

    def run() -> Driven:
        surroundings = place | {source.variable: str(fetched(source))}
        return driven(source.name, OTHERS, source.how, [source.tests], surroundings, of_source=source.version)

    return tried(source.name, source.version, source.how, run)


def driven_teachers() -> Driven:
    """Runs the tests of distillation from a teacher, in this environment and with the packages of the clients."""
    surroundings = {source.variable: str(fetched(source)) for source in TEACHER_CLIENTS}
    surroundings["PYTHONPATH"] = str(FOLDER / "teachers")
    tests = ["tests/frameworks/test_teachers.py"]
    return driven(
        "teacher clients", Path(sys.executable), TEACHER_CODE, tests, surroundings, of_source=TEACHER_VERSIONS
    )


def tried(name: str, wanted: str, how: str, run: Callable[[], Driven]) -> Driven:
    """What was driven; a row with the reason if the program could not be installed or fetched, or its tests not run."""
    try:
        return run()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return Driven(name, wanted, how, 0, 0, {}, str(error))


def driven(
    name: str,
    python: Path,
    how: str,
    tests: Sequence[str],
    variables: dict[str, str] | None = None,
    *,
    of_source: str | None = None,
) -> Driven:
    """Runs tests in the environment of a program, outside this project's own settings of pytest.

    `of_source`: the version, if the program is not installed there. Raises RuntimeError if pytest did not run them.
    """
    own = [] if python == Path(sys.executable) else ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    surroundings = os.environ | (variables or {}) | ({} if not own else {"PYTHONPATH": PATHS})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            *own,
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            *(str(ROOT / test) for test in tests),
        ]
        done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the tests of {name} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        suite = ElementTree.parse(report).getroot()[0]
    print(done.stdout[-2000:] if done.returncode else f"{name}: passed")
    run, skipped, *failures = (int(suite.get(kind, 0)) for kind in ("tests", "skipped", "failures", "errors"))
    figures: dict[str, list[float]] = {}
    for measured in suite.iter("property"):
        figures.setdefault(measured.attrib["name"], []).append(float(measured.attrib["value"]))
    found = version(python, name) if of_source is None else of_source
    return Driven(name, found, how, run - skipped - sum(failures), sum(failures), figures)


def version(python: Path, name: str) -> str:
    asked = f"from importlib.metadata import version; print(version('{name}'))"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
