"""The layout and its rules: what each module may import, and what it may not do.

Rules are read from the syntax trees; lightness is proven by importing in a fresh process that lacks everything else.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SERVICE, TRAINER = "dense_reward", "dense_reward_trainer"
SOURCES = {SERVICE: ROOT / "service", TRAINER: ROOT / "trainer"}

CORE = {"httpx2", "numpy", "pydantic"}
MODEL_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "vllm", "accelerate", "peft", "flash_attn"}
WEB_LIBRARIES = {"fastapi", "starlette", "uvicorn"}
TRAINING_LIBRARIES = {"trl", "datasets", "matplotlib", "tqdm"}
HEAVY = MODEL_LIBRARIES | WEB_LIBRARIES | TRAINING_LIBRARIES

REQUIRED_LIGHT = {"errors", "settings", "schemas", "telemetry.metrics", "reward", "records", "client"}
LIGHT_ONCE_WRITTEN = {"batching.packing", "cli"}
HTTP_EDGE = {f"{SERVICE}.http", f"{SERVICE}.cli"}
WEIGHTLESS_ENGINES = {"dense_reward.records", "dense_reward.engines.fake"}
JOBS = {
    *(f"{TRAINER}.jobs.{job}" for job in ("sft", "dpr", "gradient", "evaluate", "credit", "demo")),
    *(f"{TRAINER}.studies.{study}" for study in ("compare_options", "regimes")),
}
PURE = {
    *(f"{SERVICE}.{name}" for name in ("text.*", "heatmap*", "batching.packing", "reward")),
    *(f"{TRAINER}.{name}" for name in ("rl.losses", "rl.returns")),
}
IMPURE = {"asyncio", "datetime", "httpx2", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "time"}
FILE_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
PRINTERS = {f"{SERVICE}.cli", f"{TRAINER}.cli", f"{TRAINER}.jobs.demo"}
VAGUE_NAME = re.compile(r"(^|_)(utils?|helpers?|common|manager|handlers?|misc)(_|$)")


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    place: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Import:
    """`function` is the innermost function around it, None at module level; `typing`: under `if TYPE_CHECKING`."""

    name: str
    line: int
    function: str | None = None
    typing: bool = False

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]

    @property
    def late(self) -> bool:
        """Not run by importing the module."""
        return self.typing or self.function is not None


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for package, source in SOURCES.items():
        for file in sorted((source / package).rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found.append(Module(name, str(file.relative_to(ROOT)), ast.parse(file.read_text("utf-8"))))
    return tuple(found)


def imports_of(module: Module) -> Iterator[Import]:
    """`from a import b` gives a.b, so that importing a module and a name from it look alike to a prefix check."""
    yield from _imports_below(module, module.tree, None, False)


def _imports_below(module: Module, node: ast.AST, function: str | None, typing: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            yield from (Import(alias.name, node.lineno, function, typing) for alias in node.names)
        case ast.ImportFrom():
            origin = _origin(module, node)
            yield from (Import(f"{origin}.{alias.name}", node.lineno, function, typing) for alias in node.names)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            function = name
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            typing = True
    for child in ast.iter_child_nodes(node):
        yield from _imports_below(module, child, function, typing)


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = module.place.endswith("__init__.py")
    parents = module.name.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def forbid(rule: str, breaks: Callable[[Module, Import], bool]) -> None:
    """Fails with every import, at any depth, that breaks the rule."""
    report(
        rule,
        (
            f"{module.place}:{found.line} imports {found.name}"
            for module in modules()
            for found in imports_of(module)
            if breaks(module, found)
        ),
    )


def report(rule: str, offences: Iterable[str]) -> None:
    listed = list(offences)
    assert not listed, f"{rule}:\n" + "\n".join(f"  {line}" for line in listed)


def within(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def test_the_reader_tells_early_late_and_typing_imports_apart() -> None:
    source = """
        import torch.nn
        from . import heads
        from ...errors import Fault
        if TYPE_CHECKING:
            import vllm
        def load():
            from transformers import AutoModel
    """
    module = Module(
        "dense_reward.engines.torch.pair",
        "service/dense_reward/engines/torch/pair.py",
        ast.parse(textwrap.dedent(source)),
    )
    assert list(imports_of(module)) == [
        Import("torch.nn", 2),
        Import("dense_reward.engines.torch.heads", 3),
        Import("dense_reward.errors.Fault", 4),
        Import("vllm", 6, typing=True),
        Import("transformers.AutoModel", 8, function="load"),
    ]


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    package = Module("dense_reward.client", "client/__init__.py", ast.parse("from .client import Client"))
    assert [found.name for found in imports_of(package)] == ["dense_reward.client.client.Client"]


def test_the_service_knows_nothing_of_the_trainer() -> None:
    forbid(
        "imports run trainer -> service -> libraries, never back",
        lambda module, found: module.package == SERVICE and found.library == TRAINER,
    )


def test_libraries_of_the_trainer_stay_out_of_the_service() -> None:
    forbid(
        f"{sorted(TRAINING_LIBRARIES)} belong to the trainer",
        lambda module, found: module.package == SERVICE and found.library in TRAINING_LIBRARIES,
    )


def may_import_models(module: Module, found: Import) -> bool:
    if module.package == TRAINER:
        return True
    if module.name in WEIGHTLESS_ENGINES:
        return False
    if within(module.name, {f"{SERVICE}.engines", f"{SERVICE}.checkpoints"}):
        return True
    if within(module.name, {f"{SERVICE}.adapters"}):
        return found.late
    return module.name.startswith(f"{SERVICE}.client") and (found.function == "to_torch" or found.typing)


def test_model_libraries_live_in_the_engines_and_late_in_adapters_and_to_torch() -> None:
    forbid(
        f"{sorted(MODEL_LIBRARIES)} belong in engines/ (not fake), checkpoints/, late in adapters/ and to_torch",
        lambda module, found: found.library in MODEL_LIBRARIES and not may_import_models(module, found),
    )


def test_one_file_of_the_service_imports_vllm() -> None:
    forbid(
        "vllm belongs in engines/remote/vllm.py alone",
        lambda module, found: (
            found.library == "vllm" and module.package == SERVICE and module.name != f"{SERVICE}.engines.remote.vllm"
        ),
    )


def test_web_frameworks_stay_at_the_http_edge() -> None:
    forbid(
        f"{sorted(WEB_LIBRARIES)} belong in {sorted(HTTP_EDGE)}",
        lambda module, found: found.library in WEB_LIBRARIES and not within(module.name, HTTP_EDGE),
    )


def test_jobs_are_started_by_the_command_line_alone() -> None:
    forbid(
        "a trainer job is imported by cli.py alone: jobs meet through checkpoints on disk",
        lambda module, found: within(found.name, JOBS - {module.name}) and module.name != f"{TRAINER}.cli",
    )


def impurities(module: Module) -> Iterator[str]:
    for found in imports_of(module):
        if found.library in IMPURE or within(found.name, {"importlib.resources"}):
            yield f"{module.place}:{found.line} imports {found.name}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Name(id="open")):
                yield f"{module.place}:{node.lineno} opens a file"
            case ast.Call(func=ast.Attribute(attr=method)) if method in FILE_METHODS:
                yield f"{module.place}:{node.lineno} calls {method}()"


def test_a_clock_and_an_open_file_are_seen() -> None:
    module = Module("dense_reward.reward", "reward.py", ast.parse("import time\nopen('x')\npath.read_text()"))
    assert list(impurities(module)) == [
        "reward.py:1 imports time",
        "reward.py:2 opens a file",
        "reward.py:3 calls read_text()",
    ]


def test_the_pure_core_has_no_clock_no_files_and_no_network() -> None:
    pure = [module for module in modules() if any(fnmatchcase(module.name, name) for name in PURE)]
    report(f"{sorted(PURE)} are pure", (offence for module in pure for offence in impurities(module)))


def test_only_commands_print() -> None:
    report(
        f"only {sorted(PRINTERS)} print",
        (
            f"{module.place}:{node.lineno}"
            for module in modules()
            if module.name not in PRINTERS
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ),
    )


@pytest.mark.parametrize("name", ["utils", "io_utils", "helper", "common", "queue_manager", "handlers"])
def test_a_name_that_says_nothing_is_recognised(name: str) -> None:
    assert VAGUE_NAME.search(name)


def test_modules_are_named_after_what_they_hold() -> None:
    vague = (module.place for module in modules() if any(VAGUE_NAME.search(part) for part in module.name.split(".")))
    report("modules are nouns of the field, not utils, helpers, common, manager or handler", vague)


def test_nothing_hides_in_a_base_class() -> None:
    report(
        "a Protocol says what something is; classes named Base... are not needed",
        (
            f"{module.place}:{node.lineno} class {node.name}"
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and node.name.startswith("Base")
        ),
    )


def test_the_core_distribution_asks_for_three_libraries() -> None:
    requirements = map(Requirement, importlib.metadata.requires("dense-reward") or [])
    core = {requirement.name for requirement in requirements if "extra" not in str(requirement.marker)}
    assert core == CORE, "a client must fit into anybody's environment"


def installed_with(distributions: Collection[str]) -> set[str]:
    """Normalised names of the distributions and of all that they require here, extras left out."""
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


# Arguments: "allow" or "block", the libraries meant, "--", what to import (module or module:name).
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
    """Imports the names in a fresh process in which the libraries are all there is, or all that is missing."""
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


@pytest.mark.parametrize("name", sorted(REQUIRED_LIGHT))
def test_a_light_module_exists(name: str) -> None:
    assert f"{SERVICE}.{name}" in {module.name for module in modules()}, f"the service has no module {name}"


def light_modules() -> list[str]:
    present = {module.name for module in modules()}
    return sorted({SERVICE, *(f"{SERVICE}.{name}" for name in REQUIRED_LIGHT | LIGHT_ONCE_WRITTEN)} & present)


@pytest.mark.parametrize("name", light_modules())
def test_a_light_module_imports_without_anything_heavy(name: str) -> None:
    import_with("block", HEAVY, name)
