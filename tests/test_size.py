"""Files stay within 400 lines and functions within 60; of a package's functions nine in ten stay within 25."""

import ast
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("service", "trainer", "tests", "bench", "docs", "constraints", "helm", "docker")
PACKAGES = ("service/dense_reward", "trainer/dense_reward_trainer")
FILE_LIMIT_LINES = 400
FUNCTION_LIMIT_LINES = 60
CALM_FUNCTION_LINES = 25


@dataclass(frozen=True, slots=True)
class Function:
    place: str
    lines: int


def python_files() -> list[Path]:
    """Python files of the project that git tracks or would track; without git, all files in its folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name.endswith(".py")]
    else:
        files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return sorted(file for file in files if file.is_file())


def functions_in(source: str, place: str) -> Iterator[Function]:
    """Every function, nested ones too, from its `def` to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Function(f"{place}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)


def functions_under(folder: str) -> list[Function]:
    files = [file for file in python_files() if file.is_relative_to(ROOT / folder)]
    return [f for file in files for f in functions_in(file.read_text("utf-8"), os.fspath(file.relative_to(ROOT)))]


def listing(functions: Sequence[Function]) -> str:
    longest_first = sorted(functions, key=lambda function: -function.lines)
    return "\n".join(f"  {function.place}: {function.lines} lines" for function in longest_first)


def test_the_check_sees_the_files_of_both_packages_and_its_own() -> None:
    seen = {os.fspath(file.relative_to(ROOT)) for file in python_files()}
    assert seen >= {*(f"{package}/__init__.py" for package in PACKAGES), "tests/test_size.py"}


def test_a_function_is_measured_with_the_ones_nested_in_it() -> None:
    source = "class C:\n    async def outer(self):\n        def inner():\n            pass\n        return inner\n"
    assert list(functions_in(source, "c.py")) == [Function("c.py:2 outer", 4), Function("c.py:3 inner", 2)]


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in python_files()}
    too_long = [f"  {file.relative_to(ROOT)}: {n} lines" for file, n in lengths.items() if n > FILE_LIMIT_LINES]
    assert not too_long, f"files over {FILE_LIMIT_LINES} lines; split them by topic:\n" + "\n".join(too_long)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_longer_than_the_limit(folder: str) -> None:
    too_long = [function for function in functions_under(folder) if function.lines > FUNCTION_LIMIT_LINES]
    assert not too_long, f"functions over {FUNCTION_LIMIT_LINES} lines:\n{listing(too_long)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_nine_functions_in_ten_are_short(package: str) -> None:
    functions = functions_under(package)
    longer = [function for function in functions if function.lines > CALM_FUNCTION_LINES]
    allowed = len(functions) // 10
    assert len(longer) <= allowed, (
        f"{len(longer)} of {len(functions)} functions in {package} are over {CALM_FUNCTION_LINES} lines; "
        f"at most {allowed} may be:\n{listing(longer)}"
    )
