"""lm-evaluation-harness on the demo's checkpoints: by the job leaderboard, and through the service's completions."""

import json
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from dense_reward_trainer.data.corruption import digit_corruption
from dense_reward_trainer.runs.local_service import free_port, serving_run

from bench.circumstances import Json
from bench.evaluation.judging import PROGRAM, write

RUN = Path("runs/demo")
TASKS = ("worked_additions", "last_lines")
PROBLEMS = 40
TEACHERS = {"sft": "early", "early": "early:reference", "tilted": "early:tilted=1.0"}
"""Policy -> its name at the service; `leaderboard` measures the first two as checkpoints."""


def measure() -> tuple[Json, Json]:
    """Two tasks in files, of checkpoints by the harness's own loop and of the service's policies by their URL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder / "tasks")
        local = _leaderboard(folder, tasks)
        with serving_run(RUN, free_port(), threads=1) as (_, url):
            commands = {policy: _command(url, teacher, tasks, folder / policy) for policy, teacher in TEACHERS.items()}
            for command in commands.values():
                subprocess.run(command, check=True, stdout=sys.stderr.fileno())
        served = {policy: _accuracies(folder / policy) for policy in TEACHERS}
        likelihoods = {policy: _likelihoods(folder / policy) for policy in TEACHERS}
        errors = [
            abs(one - other)
            for policy, where in {"sft": "sft", "early": "early"}.items()
            for one, other in zip(likelihoods[policy], _likelihoods(folder / "run" / "lm_eval" / where), strict=True)
        ]
    figures: Json = {
        "lm_eval_tasks": list(TASKS),
        "lm_eval_accuracy_of_checkpoints": {policy: local[policy] for policy in ("sft", "early")},
        "lm_eval_accuracy_through_the_service": served,
        "lm_eval_logprob_difference_nats": max(errors),
    }
    shown = shlex.join(["lm_eval", *commands["tilted"][3:]]).replace(f"{folder}/", "").replace(url, "URL")
    return figures, {"problems": PROBLEMS, "command": shown, "compared": len(errors)}


def write_tasks(folder: Path) -> Path:
    """Two tasks of two choices: the right working or one with a wrong digit, whole and in its last line.

    Each has problems of its own: for equal texts, lm_eval 0.4.13 reuses the log-probs of one in the other, also if
    the choice begins elsewhere in it.
    """
    rng = random.Random(0)
    rows = [json.loads(line)["messages"] for line in (RUN / "held_out.jsonl").read_text().splitlines()]
    folder.mkdir()
    for at, task in enumerate(TASKS):
        problems: list[Json] = []
        here = rows[at * PROBLEMS : (at + 1) * PROBLEMS]
        for prompt, response in ((row[0]["content"], row[1]["content"]) for row in here):
            shown, right = ("", response) if task == "worked_additions" else _without_last_line(response)
            text = f"{prompt}\n{shown}"  # the renderer `plain`
            problems.append({"question": text, "choices": [right, digit_corruption(right, rng).text]})
        write(folder / f"{task}.jsonl", problems)
        content = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(content))
    return folder


def _without_last_line(response: str) -> tuple[str, str]:
    before, _, last = response.rpartition("\n")
    return f"{before}\n", last


def _leaderboard(folder: Path, tasks: Path) -> dict[str, dict[str, float]]:
    values = {
        "output_dir": str(folder / "run"),
        "policies": {name: str(RUN / "checkpoints" / name) for name in ("sft", "early")},
        "version": None,
        "tasks": list(TASKS),
        "shots": 0,
        "include_path": str(tasks),
        "dtype": "float32",
        "batch_size": 8,
        "device": "cpu",
    }
    (folder / "leaderboard.yaml").write_text(yaml.safe_dump(values))
    subprocess.run([*PROGRAM, "leaderboard", str(folder / "leaderboard.yaml")], check=True)
    found = json.loads((folder / "run" / "leaderboard.json").read_text())
    return {policy: {task: one["results"][task]["acc"] for task in TASKS} for policy, one in found.items()}


def _command(url: str, teacher: str, tasks: Path, output: Path) -> list[str]:
    """What docs/evaluation.md tells a user to run."""
    model = {
        "model": teacher,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(RUN / "checkpoints" / "sft"),
        "tokenizer_backend": "huggingface",
        "max_length": 128,
    }
    options = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(output)]
    arguments = ["--model", "local-completions", "--model_args", json.dumps(model), "--batch_size", "8"]
    return [sys.executable, "-m", "lm_eval", "run", *arguments, *options, "--log_samples"]


def _accuracies(output: Path) -> dict[str, float]:
    (file,) = output.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {task: results[task]["acc,none"] for task in TASKS}


def _likelihoods(output: Path) -> Sequence[float]:
    """The log-probs of all choices, in order."""
    found: list[float] = []
    for task in TASKS:
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        lines = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda one: one["doc_id"])
        found += [float(answer[0]) for line in lines for answer in line["filtered_resps"]]
    return found
