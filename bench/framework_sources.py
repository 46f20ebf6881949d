"""Fetches the source of programs whose own code `make test-frameworks` drives, into .frameworks.

A wheel of a fixed version or a commit: of each, only single modules are imported, because the whole needs GPUs. An
environment variable such as FRAMEWORK_SOURCE_SLIME names a copy that is there already.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".frameworks"
PATIENCE_S = 600


@dataclass(frozen=True, slots=True)
class Source:
    """A wheel, or a commit of `repository`. `inside`: where the packages lie in it; `python`: what the wheel is for."""

    name: str
    version: str
    how: str
    repository: str | None = None
    inside: str = "."
    python: str = "3.11"

    @property
    def variable(self) -> str:
        """The environment variable that names the folder of the packages."""
        return f"FRAMEWORK_SOURCE_{self.name.upper().replace('-', '_')}"

    @property
    def tests(self) -> str:
        return f"tests/frameworks/test_{self.name}.py"


SOURCES = (
    Source(
        "openrlhf",
        "0.11.2",
        "the executor of its wheel: its request and its loading of reward files; the whole package needs flash-attn "
        "2.8.3, which is built with nvcc",
        inside="openrlhf-0.11.2.data/purelib",
        python="3.12",
    ),
    Source(
        "skyrl",
        "0.3.0",
        "its wheel, with its requirements installed: its generator, validation, batches and advantages; on Python 3.11 "
        "its import fails (PydanticUserError: use typing_extensions.TypedDict), so it gets that TypedDict",
    ),
    Source(
        "slime",
        "624b824a898ab0ec1fcb4d373004c7f3852bf515",
        "a commit: its conversion of samples, the way to its training processes and its loss hook; Megatron and SGLang "
        "are stand-ins",
        repository="https://github.com/THUDM/slime",
    ),
    Source(
        "miles",
        "31f1ca961a94cb860cec3b2dea34ec332bfa8f76",
        "a commit: its conversion of samples and its advantages; Megatron and SGLang are stand-ins",
        repository="https://github.com/radixark/miles",
    ),
    Source("areal", "1.0.4", "the wheel: its workflow, rollout thread and reward wrapper"),
)

TEACHER_CLIENTS = (
    *(source for source in SOURCES if source.name in ("slime", "miles")),
    Source(
        "prime-rl",
        "559b44772e471d1538537b8805cc77f3824a5e64",
        "a commit: its pool of teachers",
        repository="https://github.com/PrimeIntellect-ai/prime-rl",
    ),
)
"""Programs whose clients ask a teacher for log-probs (tests/frameworks/test_teachers.py)."""


def fetched(source: Source) -> Path:
    """The folder of the packages of a program. Raises RuntimeError with the reason if it cannot be fetched."""
    given = os.environ.get(source.variable)
    if given is not None:
        return Path(given)
    folder = FOLDER / f"{source.name}-{source.version}"
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as made:
            fetch = _wheel if source.repository is None else _commit
            fetch(source, Path(made) / "source")
            (Path(made) / "source").rename(folder)
    return folder / source.inside


def _wheel(source: Source, folder: Path) -> None:
    wheels = folder.parent / "wheels"
    only = ["--no-deps", "--only-binary", ":all:", "--python-version", source.python, "--dest", str(wheels)]
    _run([sys.executable, "-m", "pip", "download", "--quiet", *only, f"{source.name}=={source.version}"])
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        archive.extractall(folder)


def _commit(source: Source, folder: Path) -> None:
    _run(["git", "init", "--quiet", str(folder)])
    _run(["git", "-C", str(folder), "fetch", "--quiet", "--depth", "1", str(source.repository), source.version])
    _run(["git", "-C", str(folder), "checkout", "--quiet", "FETCH_HEAD"])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not end within {PATIENCE_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-500:])
