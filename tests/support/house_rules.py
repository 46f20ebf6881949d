"""The tables that tests/test_architecture.py holds the code to: which room may import which, and what each must not."""

from import_graph import SERVICE, TRAINER

# Room -> the rooms that it may import. A room is listed after all rooms that it imports, so there is no circle.
# A room without a folder is a module at the top of its package.
SERVICE_ROOMS = {
    "answers": "",
    "bounded_connections": "",
    "cancellation": "",
    "credentials": "",
    "errors": "",
    "folders": "",
    "limits": "",
    "records": "",
    "waits": "",
    "text": "cancellation errors records",
    "reward": "records",
    "schemas": "limits reward",
    "hashed_files": "errors",
    "manifest": "errors folders hashed_files text",
    "heatmap": "reward",
    "telemetry": "credentials errors records heatmap",
    "settings": "errors limits telemetry waits",
    "client": "answers bounded_connections credentials heatmap manifest records schemas text waits",
    "batching": "cancellation errors records telemetry",
    "engines": "cancellation errors hashed_files manifest records text",
    "engines.trial": "engines errors hashed_files",
    "engines.kernels": "batching records",
    "engines.torch": "batching engines engines.kernels engines.trial errors hashed_files manifest records reward "
    "settings text",
    "engines.teacher": "engines.kernels engines.torch records",
    "engines.token_head": "batching engines engines.torch errors hashed_files manifest records text",
    "engines.remote": "answers folders engines errors manifest records settings text",
    "checkpoints": "engines engines.token_head engines.torch errors folders hashed_files heatmap manifest records text",
    "scoring": "batching cancellation errors records reward schemas telemetry text",
    "serving": "batching engines engines.remote engines.teacher engines.token_head engines.torch engines.trial errors "
    "hashed_files manifest records schemas scoring settings telemetry text",
    "teacher": "batching errors limits records schemas scoring text",
    "http.openapi": "errors schemas",
    "http": "batching cancellation credentials errors heatmap http.openapi limits records schemas scoring serving "
    "settings teacher telemetry text",
    "bulk": "batching checkpoints client credentials errors records schemas scoring serving settings waits",
    "bulk.stats": "bulk checkpoints errors heatmap records",
    "command_line": "bulk bulk.stats checkpoints engines.torch errors heatmap http serving settings telemetry",
    "cli": "command_line",
}
TRAINER_ROOMS = {
    "errors": "",
    "text_table": "",
    "launch": "errors",
    "data": "",
    "recipe_files": "errors",
    "configs": "data errors",
    "runs": "configs errors recipe_files",
    "tasks": "configs data errors",
    "sft": "configs data errors runs",
    "rl": "configs data errors runs",
    "credit": "configs data errors rl runs",
    "benchmarks": "configs credit data rl runs",
    "policies": "configs credit data errors rl",
    "selfplay": "configs data errors rl runs sft",
    "reward_model": "configs data errors rl runs sft",
    "preview": "configs credit data errors policies rl runs",
    "integrations": "configs errors rl",
    "reports": "errors runs",
    "commands": "launch recipe_files runs",
    "job_runner": "commands configs data errors launch recipe_files reports runs",
    "cli": "commands job_runner runs",
    "win_rates": "configs credit data errors runs",
    "studies": "configs errors",
    "studies.methods": "selfplay",
    "studies.options": "configs credit errors rl runs text_table",
    "studies.regimes": "cli commands configs credit data errors launch recipe_files rl runs tasks text_table",
    "jobs": "benchmarks configs credit data errors integrations policies preview reward_model rl runs selfplay sft "
    "text_table win_rates",
}
MODEL_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "vllm", "accelerate", "peft", "flash_attn"}
WEB_LIBRARIES = {"fastapi", "starlette", "uvicorn"}
TRAINING_LIBRARIES = {"trl", "datasets", "matplotlib", "tqdm", "scipy"}
DRAWS = {f"{SERVICE}.{name}": {"matplotlib"} for name in ("bulk.stats.picture", "heatmap.figure")}
HEAVY = MODEL_LIBRARIES | WEB_LIBRARIES | TRAINING_LIBRARIES
JOBS = {
    *(
        f"{TRAINER}.jobs.{job}"
        for job in (
            *("sft", "irft", "rft", "dpr", "gradient", "evaluate", "credit"),
            *("benchmark", "leaderboard", "judge", "demo", "preview"),
        )
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
        "configs.advantages configs.base configs.benchmark configs.credit configs.dense_reward configs.dpr "
        "configs.evaluate configs.irft configs.judge configs.preview configs.rft configs.sample "
        "configs.service configs.sft configs.signals": MODEL_LIBRARIES,
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
        "integrations.aggregated integrations.connection integrations.samples integrations.verl": TRAINER_JOBS
        | {f"{TRAINER}.rl.policy", f"{TRAINER}.rl.sampling", "trl"},
        "launch": HEAVY,
        "policies.choice": MODEL_LIBRARIES | TEXT | FILES,
        "policies.chosen policies.kept policies.load policies.signals": TRAINER_JOBS,
        "preview.gains preview.labelled preview.plot preview.ranking preview.table preview.verdict": MODEL_LIBRARIES
        | TRAINER_JOBS,
        "preview.evidence": TRAINER_JOBS,
        "preview.sampled": NETWORK | TRAINER_JOBS,
        "win_rates.statistics": MODEL_LIBRARIES | NETWORK | FILES | TRAINER_JOBS,
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
PRINTERS = {f"{SERVICE}.{n}" for n in ("bulk.command", "bulk.stats.command")}
PRINTERS |= {f"{SERVICE}.command_line.{n}" for n in ("parser", "subcommands")}
PRINTERS |= {f"{TRAINER}.{n}" for n in ("job_runner", "jobs.demo")}
