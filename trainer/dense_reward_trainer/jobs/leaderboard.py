"""The `leaderboard` job: runs lm-evaluation-harness on each checkpoint, in its own process, by a command that it shows.

The harness computes and writes its own results; this job adds one table of them. A stopped job goes on with the
checkpoints that it has not measured.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import adapter_base_folder, files_folder, load_manifest
from dense_reward.records import Report

from dense_reward_trainer.configs.benchmark import LeaderboardConfig
from dense_reward_trainer.configs.evaluate import PolicyOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.policies.load import check_sampled
from dense_reward_trainer.runs.kept_parts import KeptParts, inputs_of_config
from dense_reward_trainer.runs.next_step import finished, report_page
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.text_table import aligned

HARNESS = "lm_eval"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the harness found for one checkpoint. `command`: how it was started; `versions`: those of its tasks.

    `results`: task or group -> metric -> value, with the names of the harness; `shots`: by task.
    """

    command: str
    results: dict[str, dict[str, float]]
    shots: dict[str, int]
    versions: dict[str, str]


def run(config: LeaderboardConfig, report: Report) -> None:
    """Writes leaderboard.json, and the harness's own files in lm_eval/NAME; reports the commands and a table.

    Raises ConfigError if the harness is not installed, CheckpointError for a checkpoint that cannot be used, and
    JobError if the harness fails; its own output is on stderr.
    """
    check_run("leaderboard", config)
    if find_spec(HARNESS) is None:
        raise ConfigError("leaderboard needs lm-evaluation-harness: pip install '.[eval]' in the project's folder")
    for folder in config.policies.values():
        check_sampled(PolicyOptions(checkpoint=folder))
    device = chosen_device(config.device)
    opened = open_run("leaderboard", config)
    parts = KeptParts(opened.folder / "parts", report, inputs_of_config(config))
    measured = {}
    for name, folder in config.policies.items():
        output = opened.folder / HARNESS / name
        manifest = load_manifest(folder)
        places = files_folder(folder, manifest), adapter_base_folder(folder, manifest)
        command = harness_command(config, places, output, device)
        inputs = {"the checkpoint": manifest.content_sha256}
        measured[name] = parts.get(name, Measured, partial(_run, command, output, report), inputs)
    path = opened.folder / "leaderboard.json"
    write_whole(path, json.dumps({name: asdict(one) for name, one in measured.items()}, indent=2).encode() + b"\n")
    report(leaderboard_table(measured))
    report(finished(path, report_page(opened.folder)))


def harness_command(
    config: LeaderboardConfig, places: tuple[Path, Path | None], output: Path, device: str
) -> list[str]:
    """The command that measures one checkpoint. `places`: its files, and the base model of a LoRA adapter."""
    files, base = places
    model = {"pretrained": files} if base is None else {"pretrained": base, "peft": files}
    options: dict[str, object] = {
        "--model": "hf",
        "--model_args": ",".join(f"{key}={value}" for key, value in {**model, "dtype": config.dtype}.items()),
        "--tasks": ",".join(config.wanted),
        "--batch_size": config.batch_size,
        "--device": device,
        "--output_path": output,
        "--num_fewshot": config.shots,
        "--limit": config.limit,
        "--include_path": config.include_path,
    }
    given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    chat = ["--apply_chat_template"] if config.chat_template else []
    return [sys.executable, "-m", HARNESS, "run", *given, *chat, "--log_samples"]


def _run(command: Sequence[str], output: Path, report: Report) -> Measured:
    report(f"running {shlex.join(command)}")
    # its tables go to stderr too: stdout of a job is for what it returns
    code = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    found = sorted(output.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    if code != 0 or not found:
        raise JobError(
            f"lm_eval ended with exit code {code}; its reason is above. It was started by {shlex.join(command)}"
        )
    return read_results(shlex.join(command), json.loads(found[-1].read_bytes()))


def read_results(command: str, written: Mapping[str, Any]) -> Measured:
    """From the harness's own results: numbers only, `acc,none` as `acc`."""
    results = {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in found.items()
            if isinstance(value, int | float) and not metric.startswith("sample_")
        }
        for task, found in written["results"].items()
        if isinstance(found, Mapping)
    }
    shots = {task: value for task, value in written.get("n-shot", {}).items() if isinstance(value, int)}
    versions = {task: str(value) for task, value in written.get("versions", {}).items()}
    return Measured(command, results, shots, versions)


def leaderboard_table(measured: Mapping[str, Measured]) -> str:
    """A line for each task and metric, a column for each policy: the value and its standard error."""
    rows = [["task", "shots", "metric", *measured]]
    first = next(iter(measured.values()))
    for task, found in first.results.items():
        for metric in found:
            if "_stderr" not in metric:
                cells = [_cell(one.results.get(task, {}), metric) for one in measured.values()]
                rows.append([task, str(first.shots.get(task, "")), metric, *cells])
    return f"{aligned(rows)}\n± standard error, by lm_eval"


def _cell(found: Mapping[str, float], metric: str) -> str:
    if metric not in found:
        return "-"
    name, comma, filter_ = metric.partition(",")
    error = found.get(f"{name}_stderr{comma}{filter_}")
    return f"{found[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
