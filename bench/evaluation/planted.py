"""A ProcessBench-format file of 100 solutions with planted errors: the job's metric, and three of them by hand."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from dense_reward import Client, ScoreOptions
from dense_reward_trainer.runs.local_service import free_port, serving_run

from bench.circumstances import Json
from bench.evaluation.judging import PROGRAM

RUN = Path("runs/demo")
TUNED, TESTED, BY_HAND = 60, 100, 3
COLUMN: Literal["sft_logprob"] = "sft_logprob"
ROW = f"{COLUMN} by min, first_drop"


def measure() -> tuple[Json, Json]:
    """The table of the demo's pairs; one row of it is computed once more, in plain loops."""
    with tempfile.TemporaryDirectory() as name, serving_run(RUN, free_port(), threads=1) as (_, url):
        folder = Path(name)
        example = [sys.executable, "examples/process_bench_file.py", str(RUN / "held_out.jsonl"), f"{folder}/all.jsonl"]
        subprocess.run(example, check=True)
        rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
        parts = {"tune": rows[:TUNED], "test": rows[TUNED : TUNED + TESTED]}
        for part, chosen in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        files = f"first_errors={{tune: {folder}/tune.jsonl, test: {folder}/test.jsonl}}"
        job = [*PROGRAM, "benchmark", "benchmark_full", files, "threshold_split=tune", "prm_bench=null"]
        job += ["reward_bench_2=null", r'step_separator="\n"', f"service_url={url}", f"output_dir={folder}/run"]
        subprocess.run(job, check=True)
        found = json.loads((folder / "run" / "benchmark.json").read_text())
        values = {part: _values(folder / "run" / f"steps-{part}.jsonl") for part in parts}
        differences = [_by_hand(url, row, values["test"][at]) for at, row in enumerate(parts["test"][:BY_HAND])]
    labels = {part: [row["label"] for row in chosen] for part, chosen in parts.items()}
    (table,) = (one for one in found["tables"] if one["name"].split()[-1] == "test")
    reported = {_method(row): row["metric"]["value"] for row in table["rows"]}
    (threshold,) = next(row["thresholds"] for row in table["rows"] if _method(row) == ROW)
    best = max(f1(values["tune"], labels["tune"], at) for at in {one for steps in values["tune"] for one in steps})
    mine = f1(values["test"], labels["test"], threshold)
    figures: Json = {
        "planted_solutions": TESTED,
        "planted_with_an_error": sum(label != -1 for label in labels["test"]),
        "planted_f1_error": abs(mine - reported[ROW]),
        "planted_tuned_f1_below_best": best - f1(values["tune"], labels["tune"], threshold),
        "planted_steps_by_hand_error_nats": max(differences),
    }
    return figures, {"by_hand": BY_HAND, "f1": reported, "control": table["control"], "labels": labels["test"]}


def _method(row: dict[str, Any]) -> str:
    one = row["method"]
    return f"{one['column']} by {one['value']}, {one['rule']}"


def _values(path: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["values"][COLUMN]["min"] for line in lines]


def _by_hand(url: str, row: dict[str, Any], steps: list[float]) -> float:
    """The largest difference to the minimum over each step's tokens, from one request and the offsets in its answer."""
    text = "\n".join(row["steps"])
    with Client(url) as client:
        options = ScoreOptions(include=[COLUMN, "offsets"], model=client.models()[0].name)
        (scored,) = client.score(prompt=row["problem"], response=text, options=options).results
    ends = [len("\n".join(row["steps"][: at + 1])) + 1 for at in range(len(row["steps"]))]  # a line feed ends its step
    lowest = [float("inf")] * len(ends)
    assert scored.offsets is not None
    assert scored.sft_logprob is not None
    for (start, end), logprob in zip(scored.offsets, scored.sft_logprob, strict=True):
        if start < len(text):  # the end of turn belongs to no step
            step = next(at for at, until in enumerate(ends) if end <= until)
            lowest[step] = min(lowest[step], float(logprob))
    return max(abs(one - other) for one, other in zip(lowest, steps, strict=True))


def f1(values: list[list[float]], labels: list[int], threshold: float) -> float:
    """ProcessBench's metric in plain loops: the first step below the threshold is named, -1 if there is none."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for steps, label in zip(values, labels, strict=True):
        named = next((at for at, value in enumerate(steps) if value < threshold), -1)
        hits[label != -1].append(named == label)
    wrong, right = (sum(found) / len(found) for found in (hits[True], hits[False]))
    return 2 * wrong * right / (wrong + right) if wrong + right else 0.0
