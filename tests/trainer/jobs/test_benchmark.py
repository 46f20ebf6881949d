"""The benchmark job with a real service of two references: all four benchmarks, resumed, and what it refuses."""

import json
import random
from pathlib import Path

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.data.arithmetic import worked_addition
from served_pair import ServedPair

pytestmark = pytest.mark.slow
NOTHING: dict[str, object] = {"threshold_split": None, "prm_bench": None, "reward_bench_2": None}
METHOD = {"column": "reward:half", "value": "min", "rule": "first_drop"}
COLUMNS = {"sft_logprob", "entropy_corrected", "reward:half", "centred:early"}


def process_bench(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Worked two-digit additions; in every other one, a digit of a step is wrong from there on."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for n in range(count):
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        steps, label = worked_addition(a, b, 2).split("\n"), -1
        if n % 2:
            label = rng.randrange(len(steps))
            steps[label] = steps[label][:-1] + str((int(steps[label][-1]) + 1) % 10)
        rows.append({"id": f"gsm8k-{n}", "problem": f"Add {a} and {b}.", "steps": steps, "label": label})
    return rows


def prm_bench(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [
        {
            "original_question": row["problem"],
            "modified_question": row["problem"],
            "modified_process": row["steps"],
            "error_steps": [] if row["label"] == -1 else [int(str(row["label"])) + 1],
            "idx": row["id"],
            "classification": "multi_solutions" if row["label"] == -1 else "deception",
        }
        for row in rows
    ]


def reward_bench_2(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    def choice(id_: str, subset: str, problem: object, *right: str) -> dict[str, object]:
        wrong = ["#### 7", "", "#### 9"]
        return {"id": id_, "subset": subset, "prompt": problem, "chosen": right, "rejected": wrong}

    found = [choice(str(n), "Math", row["problem"], "#### 1") for n, row in enumerate(rows)]
    return [*found, choice("ref:0", "Ties", "P", "#### 1"), choice("tied:0", "Ties", "P", "#### 1", "#### 2")]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(served: ServedPair, folder: Path, **more: object) -> str:
    rows = process_bench(12)
    values = {
        "output_dir": str(folder / "run"),
        "service_url": served.url,
        "first_errors": {
            "gsm8k": str(written(folder / "gsm8k.jsonl", rows)),
            "math": str(written(folder / "math.jsonl", process_bench(10, seed=1))),
        },
        "threshold_split": "gsm8k",
        "prm_bench": str(written(folder / "prm.jsonl", prm_bench(rows))),
        "reward_bench_2": str(written(folder / "choices.jsonl", reward_bench_2(rows[:3]))),
        "step_separator": "\n",
        **more,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def test_every_response_is_scored_once_and_each_table_has_a_row_for_each_way_to_judge(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", config(served_run, tmp_path)]) == 0
    result = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    tables = {table["name"]: table for table in result["tables"]}
    assert list(tables) == ["gsm8k", "math", "average", "prm_bench", "reward_bench_2"]
    for table in tables.values():
        assert {row["method"]["column"] for row in table["rows"]} >= COLUMNS
        for row in table["rows"]:
            assert row["metric"]["low"] <= row["metric"]["high"]
            is_control = ":" not in row["method"]["column"]
            assert (row["against_control"] is None) is is_control
    assert {row["method"]["rule"] for row in tables["gsm8k"]["rows"]} == {"first_drop", "lowest"}
    assert tables["prm_bench"]["rows"][0]["parts"].keys() == {"F1", "negative F1", "deception", "multi_solutions"}
    assert tables["reward_bench_2"]["rows"][0]["parts"].keys() == {"Math", "Ties", "leaderboard score"}
    assert len({json.dumps(row["thresholds"]) for row in tables["math"]["rows"]}) > 1
    (row,) = (row for row in tables["math"]["rows"] if row["method"] == METHOD)
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps-math.jsonl").read_text().splitlines()]
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for line in lines:
        values = line["values"]["reward:half"]["min"]
        named = next((step for step, value in enumerate(values) if value < row["thresholds"][0]), -1)
        hits[line["label"] != -1].append(named == line["label"])
    error, right = (sum(found) / len(found) for found in (hits[True], hits[False]))
    assert (row["parts"]["error accuracy"], row["parts"]["correct accuracy"]) == (error, right)
    assert row["metric"]["value"] == pytest.approx(2 * error * right / (error + right) if error + right else 0.0)


def test_a_second_start_takes_every_score_from_the_first(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmark", config(served_run, tmp_path, **NOTHING), "service_pair=half"]
    assert main(command) == 0
    first = (tmp_path / "run" / "benchmark.json").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert (tmp_path / "run" / "benchmark.json").read_bytes() == first
    assert "tokens/s" not in capsys.readouterr().err
    written(tmp_path / "math.jsonl", process_bench(10, seed=2))
    assert main(command) == 0
    assert "first_errors_math is measured again: the responses changed" in capsys.readouterr().err


def test_a_response_that_is_too_long_is_counted_and_never_a_hit(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = process_bench(6)
    rows[0]["steps"] = ["1+1=2 write 2 carry 0"] * 20
    more = {**NOTHING, "first_errors": {"own": str(written(tmp_path / "own.jsonl", rows))}}
    assert main(["benchmark", config(served_run, tmp_path, **more)]) == 0
    assert "own: F1 of 6 rows, 1 too long for the service" in capsys.readouterr().err
    (line, *_) = (tmp_path / "run" / "steps-own.jsonl").read_text().splitlines()
    assert json.loads(line)["values"]["sft_logprob"] == {"mean": [], "min": []}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"threshold_split": "omnimath"}, "threshold_split omnimath is no split of first_errors"),
        (
            {"first_errors": {}, "threshold_split": None, "prm_bench": None, "reward_bench_2": None},
            "nothing to measure",
        ),
        ({"limit": 1}, "1 of them|0 of 1 solutions have an error"),
        ({"prm_bench": "missing.jsonl"}, "missing.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_request(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, object], reason: str
) -> None:
    assert main(["benchmark", config(served_run, tmp_path, **more)]) == 2
    error = capsys.readouterr().err
    assert any(one in error for one in reason.split("|"))
    assert not (tmp_path / "run" / "benchmark.json").exists()
