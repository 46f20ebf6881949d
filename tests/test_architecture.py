"""The architecture: which room may import which, what each module must not import, and what a module may not do."""

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import pytest
from import_graph import ROOT, SERVICE, SOURCES, TRAINER, Import, Module, imports_of, known_to, modules, room_of, within

# Room -> the rooms that it may import. A room is listed after all rooms that it imports, so there is no circle.
# A room without a folder is a module at the top of its package.
SERVICE_ROOMS = {
    "errors": "",
    "folders": "",
    "records": "",
    "text": "errors records",
    "reward": "records",
    "schemas": "reward",
    "manifest": "errors folders text",
    "heatmap": "reward",
    "telemetry": "errors records heatmap",
    "settings": "errors schemas telemetry",
    "client": "manifest records schemas text",
    "batching": "errors records telemetry",
    "engines": "errors manifest records text",
    "engines.kernels": "batching records",
    "engines.torch": "batching engines engines.kernels errors manifest records reward settings text",
    "engines.token_head": "batching engines engines.torch errors manifest records text",
    "engines.remote": "folders engines errors manifest records settings text",
    "checkpoints": "folders engines engines.token_head engines.torch errors heatmap manifest records text",
    "scoring": "batching errors records reward schemas telemetry text",
    "serving": "batching engines engines.remote engines.token_head engines.torch errors manifest records "
    "schemas scoring settings telemetry text",
    "http": "batching errors heatmap schemas scoring serving settings telemetry text",
    "bulk": "batching checkpoints client errors records schemas scoring serving settings",
    "bulk.stats": "bulk errors heatmap records",
    "cli": "bulk bulk.stats checkpoints engines.torch errors heatmap http serving settings telemetry",
}
TRAINER_ROOMS = {
    "errors": "",
    "text_table": "",
    "launch": "errors",
    "data": "",
    "configs": "data errors",
    "runs": "configs errors",
    "tasks": "configs data errors",
    "sft": "configs data errors runs",
    "rl": "configs data errors runs",
    "credit": "configs data errors rl runs",
    "policies": "configs credit data errors rl",
    "selfplay": "configs data errors rl runs sft",
    "reward_model": "configs data errors rl runs sft",
    "preview": "configs credit data errors policies rl runs",
    "integrations": "configs errors rl",
    "cli": "configs data errors launch runs",
    "studies": "configs errors",
    "studies.methods": "selfplay",
    "studies.options": "configs credit errors rl runs text_table",
    "studies.regimes": "cli configs credit data errors rl runs tasks text_table",
    "jobs": "configs credit data errors integrations policies preview reward_model rl runs selfplay sft text_table",
}
MODEL_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "vllm", "accelerate", "peft", "flash_attn"}
WEB_LIBRARIES = {"fastapi", "starlette", "uvicorn"}
TRAINING_LIBRARIES = {"trl", "datasets", "matplotlib", "tqdm", "scipy"}
DRAWS = {f"{SERVICE}.bulk.stats.picture": {"matplotlib"}}
HEAVY = MODEL_LIBRARIES | WEB_LIBRARIES | TRAINING_LIBRARIES
JOBS = {
    *(
        f"{TRAINER}.jobs.{job}"
        for job in ("sft", "irft", "rft", "dpr", "gradient", "evaluate", "credit", "demo", "preview")
    ),
    *(f"{TRAINER}.studies.{study}" for study in ("options.compare", "regimes.study")),
}
# Module -> what it must not import, directly or through its imports.
HTTP = WEB_LIBRARIES | {f"{SERVICE}.http"}
NETWORK = HTTP | {"httpx2", f"{SERVICE}.client", f"{TRAINER}.rl.reward_service"}
FILES = {"pathlib", "os", "shutil", "tempfile"}
TEXT = {f"{SERVICE}.text", f"{SERVICE}.engines.tokenizer"}
QUEUE = {f"{SERVICE}.batching.batcher", f"{SERVICE}.batching.scheduler"}
TRAINER_JOBS = {f"{TRAINER}.jobs"}
TRAINING = TRAINER_JOBS | {f"{TRAINER}.rl.learner", f"{TRAINER}.rl.optimiser", f"{TRAINER}.sft"}
MUST_NOT_IMPORT = {
    f"{SERVICE}.{name}": forbidden
    for name, forbidden in {
        "errors": HEAVY | FILES,
        "records": HEAVY | NETWORK | FILES | {"pydantic"},
        "reward": HEAVY | NETWORK | FILES,
        "text.messages": MODEL_LIBRARIES,
        "text.offsets": MODEL_LIBRARIES,
        "text.special_tokens": MODEL_LIBRARIES,
        "batching.admission": HEAVY | QUEUE,
        "batching.packing": HEAVY,
        "batching.scheduler": HEAVY | {"threading", "concurrent", "time"},
        "batching.worker_threads": HEAVY | QUEUE,
        "checkpoints.atomic_file": HEAVY,
        "checkpoints.versions": HEAVY,
        "client.responses": HEAVY | {"httpx2"},
        "client.results": HEAVY | {"httpx2"},
        "engines.proof": {"torch", f"{SERVICE}.engines.torch", f"{SERVICE}.engines.remote"},
        "engines.kernels": {f"{SERVICE}.engines.torch"},
        "engines.remote.event_loop": {f"{SERVICE}.engines"},
        "heatmap": HEAVY | NETWORK | FILES | TEXT,
        "heatmap.lines": {f"{SERVICE}.heatmap.palette", f"{SERVICE}.heatmap.html", f"{SERVICE}.heatmap.svg"},
        "heatmap.palette": {f"{SERVICE}.heatmap.rows"},
        "heatmap.rows": {f"{SERVICE}.heatmap.html", f"{SERVICE}.heatmap.svg", f"{SERVICE}.heatmap.ansi"},
        "heatmap.style": {f"{SERVICE}.heatmap.rows"},
        "heatmap.visible": {f"{SERVICE}.heatmap.rows", f"{SERVICE}.heatmap.html"},
        "http.deadline": {f"{SERVICE}.scoring", f"{SERVICE}.batching"},
        "http.keys": WEB_LIBRARIES,
        "http.middleware": {f"{SERVICE}.http.app"},
        "http.pages": {f"{SERVICE}.scoring", f"{SERVICE}.batching"},
        "http.server": {f"{SERVICE}.http.app"},
        "scoring.score_cache": HEAVY,
        "scoring.scorer": HEAVY | {f"{SERVICE}.http"},
        "telemetry.tracing": HTTP,
    }.items()
} | {
    f"{TRAINER}.{name}": forbidden
    for names, forbidden in {
        "configs.advantages configs.base configs.credit configs.dpr configs.evaluate configs.irft configs.preview "
        "configs.rft configs.sample configs.service configs.sft configs.signals": MODEL_LIBRARIES,
        "credit.aggregates": MODEL_LIBRARIES | NETWORK,
        "credit.alignment": TRAINER_JOBS | NETWORK,
        "credit.answer_ranking credit.error_localisation credit.first_wrong_step": TRAINER_JOBS,
        "credit.auroc credit.calibration credit.paired": MODEL_LIBRARIES | TEXT,
        "data.arithmetic": MODEL_LIBRARIES | FILES,
        "data.data_sets": MODEL_LIBRARIES | TEXT | TRAINER_JOBS,
        "data.conversions data.demonstration data.layouts data.messages data.records data.row_values": MODEL_LIBRARIES
        | FILES
        | TEXT
        | {"datasets"},
        "data.corruption data.final_answers": MODEL_LIBRARIES | FILES | TEXT,
        "data.process_labels": MODEL_LIBRARIES | TRAINER_JOBS,
        "data.sources": MODEL_LIBRARIES | TEXT | TRAINER_JOBS,
        "data.tokenised": {"torch", "transformers"} | TRAINER_JOBS,
        "integrations.trl": TRAINER_JOBS | {f"{TRAINER}.rl.policy", f"{TRAINER}.rl.sampling"},
        "integrations.verl": TRAINER_JOBS | {f"{TRAINER}.rl.policy", f"{TRAINER}.rl.sampling", "trl"},
        "launch": HEAVY,
        "policies.choice": MODEL_LIBRARIES | TEXT | FILES,
        "policies.chosen policies.kept policies.load policies.signals": TRAINER_JOBS,
        "preview.gains preview.labelled preview.plot preview.ranking preview.table preview.verdict": MODEL_LIBRARIES
        | TRAINER_JOBS,
        "preview.evidence": TRAINER_JOBS,
        "preview.sampled": NETWORK | TRAINER_JOBS,
        "reward_model.head": TRAINER_JOBS | NETWORK,
        "reward_model.losses": {"transformers"} | TEXT | NETWORK,
        "reward_model.pairs": MODEL_LIBRARIES | NETWORK,
        "rl.advantages": {"transformers", f"{TRAINER}.rl.policy", f"{TRAINER}.rl.optimiser"} | NETWORK,
        "rl.batch_metrics": {"transformers", f"{TRAINER}.rl.policy", f"{TRAINER}.rl.optimiser"} | NETWORK,
        "rl.held_out_metrics": TRAINER_JOBS,
        "rl.learner": NETWORK | {f"{TRAINER}.rl.held_out_metrics"},
        "rl.losses": {"transformers", f"{TRAINER}.rl.advantages"} | NETWORK,
        "rl.optimiser": {f"{TRAINER}.rl.records"} | NETWORK,
        "rl.plot": TRAINING,
        "rl.policy rl.sampling rl.tilt rl.token_arrays": NETWORK | TRAINER_JOBS,
        "rl.prompts": {f"{TRAINER}.rl.reward_service"} | TRAINER_JOBS,
        "rl.records": MODEL_LIBRARIES | NETWORK,
        "rl.returns": {"transformers", f"{TRAINER}.rl.policy"} | NETWORK,
        "rl.reward_service": {"transformers", f"{TRAINER}.rl.policy", f"{TRAINER}.rl.losses"},
        "runs.checkpoint runs.training_state": TRAINING,
        "runs.next_step runs.processes runs.trackers": TRAINER_JOBS,
        "runs.run_folder": MODEL_LIBRARIES | TRAINING,
        "sft.callbacks": TRAINER_JOBS | {f"{TRAINER}.runs.checkpoint"},
        "sft.from_scratch sft.initial_model sft.memory_check sft.packing sft.quantised sft.row_order sft.sharding "
        "sft.training_rows": TRAINER_JOBS,
        "sft.memory": MODEL_LIBRARIES | TRAINER_JOBS | FILES,
        "studies.options.config studies.regimes.config studies.regimes.policies": MODEL_LIBRARIES,
        "studies.options.plot": {f"{TRAINER}.studies.options.compare"},
        "studies.options.table": TRAINING | {f"{TRAINER}.studies.options.compare"},
        "studies.options.exact_task studies.regimes.checks studies.regimes.figures studies.regimes.plot "
        "studies.regimes.preview studies.regimes.table": TRAINING,
        "tasks.mixed_demonstrators tasks.nuisance_entropy tasks.records tasks.worked": MODEL_LIBRARIES | TEXT,
    }.items()
    for name in names.split()
}
PURE = {
    *(f"{SERVICE}.{name}" for name in ("text.*", "heatmap*", "batching.packing", "reward", "records")),
    *(f"{TRAINER}.{name}" for name in ("sft.memory", "rl.losses", "rl.returns", "rl.advantages", "rl.records")),
    *(f"{TRAINER}.{name}" for name in ("reward_model.losses", "selfplay.losses", "selfplay.plan")),
}
IMPURE = {"asyncio", "datetime", "httpx2", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "time"}
FILE_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
PRINTERS = {f"{SERVICE}.{n}" for n in ("cli", "bulk.command", "bulk.stats.command")}
PRINTERS |= {f"{TRAINER}.{n}" for n in ("cli", "jobs.demo")}
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
        f"{sorted(TRAINING_LIBRARIES)} belong to the trainer; one module of the service draws, with matplotlib",
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
    if module.name in {f"{SERVICE}.engines.{name}" for name in ("tokenizer", "proof", "weight_keys")}:
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
        f"{sorted(WEB_LIBRARIES)} belong in http/ and cli.py",
        lambda module, found: found.library in WEB_LIBRARIES and room_of(module.name) not in {"http", "cli"},
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
