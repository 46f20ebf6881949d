"""Light modules import without heavy libraries. Verified in a fresh process in which all others are missing."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Collection
from typing import Literal

import pytest
from import_graph import SERVICE, modules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

CORE = {"httpx2", "numpy", "pydantic"}
MODEL_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "vllm", "accelerate", "peft", "flash_attn"}
HEAVY = MODEL_LIBRARIES | {"fastapi", "starlette", "uvicorn"} | {"trl", "datasets", "matplotlib", "tqdm", "scipy"}
LIGHT = {
    *(
        "batching.packing",
        "checkpoints.atomic_file",
        "checkpoints.versions",
        "cli",
        "client",
        "errors",
        "records",
        "reward",
        "schemas",
        "settings",
        "telemetry.metrics",
    ),
}


def test_the_core_distribution_asks_for_three_libraries() -> None:
    requirements = map(Requirement, importlib.metadata.requires("dense-reward") or [])
    core = {requirement.name for requirement in requirements if "extra" not in str(requirement.marker)}
    assert core == CORE, "a client must fit into any environment"


def installed_with(distributions: Collection[str]) -> set[str]:
    """Normalised names of the distributions and of all their requirements on this machine, without extras."""
    seen: set[str] = set()
    waiting = [canonicalize_name(name) for name in distributions]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [canonicalize_name(r.name) for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    return seen


def libraries_of(distributions: Collection[str]) -> set[str]:
    """Top-level names that the distributions install."""
    owners = importlib.metadata.packages_distributions()
    return {library for library, of in owners.items() if any(canonicalize_name(name) in distributions for name in of)}


# Arguments: "allow" or "block", the libraries, "--", what to import (module or module:name).
GUARDED_IMPORT = """
import importlib, sys
rule, arguments = sys.argv[1], sys.argv[2:]
libraries = set(arguments[: arguments.index("--")])

class Guard:
    @staticmethod
    def find_spec(name, path=None, target=None):
        library = name.partition(".")[0]
        listed = library in libraries
        # the interpreter's own build data: part of the standard library, but named after the platform
        standard = library in sys.stdlib_module_names or library.startswith("_sysconfigdata_")
        if listed if rule == "block" else not listed and not standard:
            raise ModuleNotFoundError(f"{name} may not be imported here", name=name)

sys.meta_path.insert(0, Guard)
for name in arguments[arguments.index("--") + 1 :]:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    if attribute:
        getattr(found, attribute)
"""


def import_with(rule: Literal["allow", "block"], libraries: Collection[str], *names: str) -> None:
    """Imports the names in a fresh process in which only the libraries exist, or only they are missing."""
    command = [sys.executable, "-c", GUARDED_IMPORT, rule, *sorted(libraries), "--", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rule", ["allow", "block"])
def test_the_guard_stops_what_may_not_be_imported(rule: Literal["allow", "block"]) -> None:
    libraries = {"allow": {"numpy"}, "block": {"pydantic"}}[rule]
    import_with(rule, libraries, "numpy")
    with pytest.raises(AssertionError, match="pydantic may not be imported here"):
        import_with(rule, libraries, "pydantic")


def test_the_client_works_where_only_the_core_is_installed() -> None:
    allowed = libraries_of(installed_with(CORE)) | {SERVICE}
    assert allowed >= CORE
    assert not allowed & HEAVY
    import_with("allow", allowed, SERVICE, f"{SERVICE}:Client", f"{SERVICE}:AsyncClient")


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_a_light_module_imports_without_anything_heavy(name: str) -> None:
    assert f"{SERVICE}.{name}" in {module.name for module in modules()}, f"the service has no module {name}"
    import_with("block", HEAVY, f"{SERVICE}.{name}")
