"""The architecture: which room may import which, what each module must not import, and what a module may not do."""

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import pytest
from house_rules import (
    DRAWS,
    FILE_METHODS,
    IMPURE,
    JOBS,
    MODEL_LIBRARIES,
    MUST_NOT_IMPORT,
    PRINTERS,
    PURE,
    SERVICE_ROOMS,
    TRAINER_ROOMS,
    TRAINING_LIBRARIES,
    WEB_LIBRARIES,
)
from import_graph import ROOT, SERVICE, SOURCES, TRAINER, Import, Module, imports_of, known_to, modules, room_of, within

VAGUE_NAME = re.compile(r"(^|_)(utils?|helpers?|common|manager|handlers?|misc)(_|$)")
MAX_FILES = 16


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


@pytest.mark.parametrize(("package", "rooms"), [(SERVICE, SERVICE_ROOMS), (TRAINER, TRAINER_ROOMS)])
def test_every_room_imports_only_rooms_above_it_in_the_table(package: str, rooms: dict[str, str]) -> None:
    above: set[str] = set()
    for room, allowed in rooms.items():
        assert set(allowed.split()) <= above, (
            f"{room} may not import {set(allowed.split()) - above}: the table lists them after it"
        )
        above.add(room)
    named = {room_of(module.name) for module in modules() if module.package == package and module.name != package}
    assert named == set(rooms), "the table names each room once"
    forbid(
        "a room imports only what the table allows",
        lambda module, found: (
            module.package == package == found.library
            and module.name != package
            and room_of(module.name) != room_of(found.name)
            and room_of(found.name) not in rooms[room_of(module.name)].split()
        ),
    )


@pytest.mark.parametrize("name", MUST_NOT_IMPORT)
def test_what_a_module_must_not_know_it_does_not_import_by_any_way(name: str) -> None:
    assert name in {module.name for module in modules()}, f"there is no module {name}"
    forbidden = MUST_NOT_IMPORT[name]
    report(f"{name} must not import {sorted(forbidden)}", (n for n in sorted(known_to(name)) if within(n, forbidden)))


def test_a_docstring_that_forbids_knowledge_has_a_row_in_the_table() -> None:
    promises = re.compile(r"\b(must not (know|import)|knows? (no|nothing))\b", re.IGNORECASE)
    report(
        "a promise that no test verifies",
        (
            module.place
            for module in modules()
            if promises.search(ast.get_docstring(module.tree) or "") and module.name not in MUST_NOT_IMPORT
        ),
    )


def test_no_folder_holds_more_files_than_can_be_read_at_a_glance() -> None:
    folders = {file.parent for source in SOURCES.values() for file in source.rglob("*.py")}
    crowded = {str(folder.relative_to(ROOT)): len([*folder.glob("*.py")]) for folder in folders}
    report(f"at most {MAX_FILES} files", (f"{folder}: {n}" for folder, n in crowded.items() if n > MAX_FILES))


def test_libraries_of_the_trainer_stay_out_of_the_service() -> None:
    forbid(
        f"{sorted(TRAINING_LIBRARIES)} belong to the trainer; two modules of the service draw, with matplotlib",
        lambda module, found: (
            module.package == SERVICE and found.library in TRAINING_LIBRARIES - DRAWS.get(module.name, {*()})
        ),
    )


def may_import_models(module: Module, found: Import) -> bool:
    if (
        module.package == TRAINER
        or room_of(module.name).startswith("engines.")
        or room_of(module.name) == "checkpoints"
    ):
        return True
    if module.name in {f"{SERVICE}.engines.{name}" for name in ("tokenizer", "long_texts", "proof", "weight_keys")}:
        return found.library != "torch"
    return room_of(module.name) == "client" and (found.function == "to_torch" or found.typing)


def test_model_libraries_live_in_the_engines_in_checkpoints_and_late_in_to_torch() -> None:
    forbid(
        f"{sorted(MODEL_LIBRARIES)} belong in engines/, checkpoints/ and client.to_torch",
        lambda module, found: found.library in MODEL_LIBRARIES and not may_import_models(module, found),
    )


def test_one_file_of_the_service_imports_vllm() -> None:
    forbid(
        "vllm belongs in engines/remote/vllm.py only",
        lambda module, found: (
            found.library == "vllm" and module.package == SERVICE and module.name != f"{SERVICE}.engines.remote.vllm"
        ),
    )


def test_web_frameworks_stay_at_the_http_edge() -> None:
    forbid(
        f"{sorted(WEB_LIBRARIES)} belong in http/ and command_line/",
        lambda module, found: found.library in WEB_LIBRARIES and room_of(module.name) not in {"http", "command_line"},
    )


def test_jobs_are_started_only_by_the_command_line() -> None:
    forbid(
        "a trainer job is imported only by cli.py: jobs meet through checkpoints on disk",
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
        "a Protocol defines an interface; classes named Base... are not needed",
        (
            f"{module.place}:{node.lineno} class {node.name}"
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and node.name.startswith("Base")
        ),
    )
