"""The `evaluate` job on a tiny pair on disk: every kind of policy in one table, and samples that are shared."""

import json
from pathlib import Path

import pytest
import yaml
from dense_reward_trainer.cli import main

pytestmark = pytest.mark.slow


def write_config(pair: Path, out: Path, **changes: object) -> str:
    sft, reference = str(pair / "sft"), str(pair / "reference")
    policies: dict[str, object] = {
        "plain": sft,
        "majority": {"checkpoint": sft, "choose": {"samples": 6, "by": "majority"}},
        "power": {"checkpoint": sft, "choose": {"samples": 3, "by": "power", "power": 4.0}},
        "cold": {"checkpoint": sft, "temperature": 0.5, "top_p": 0.9, "min_p": 0.01},
        "tilted": {"checkpoint": sft, "tilt": {"reference": reference, "strength": 0.5}},
        "extrapolated": {"checkpoint": sft, "extrapolate": {"base": reference, "strength": 0.1}},
    }
    values: dict[str, object] = {
        "output_dir": str(out),
        "policies": policies,
        "held_out": str(pair / "held_out.jsonl"),
        "held_out_options": {"max_new_tokens": 8, "samples_per_prompt": 2, "checker": "last_number"},
        "device": "cpu",
        "threads": 1,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path)


def test_every_kind_of_policy_has_its_row_and_its_samples(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    assert main(["evaluate", write_config(pair_folder, out)]) == 0
    names = ["plain", "majority", "power", "cold", "tilted", "extrapolated"]
    figures = json.loads((out / "evaluation.json").read_text())
    assert list(figures) == names
    table = capsys.readouterr().err
    shared = [line.split(" (")[0] for line in table.splitlines() if line.startswith("measuring")]
    assert shared == [f"measuring {name}" for name in ("plain, majority, power", "cold", "tilted", "extrapolated")]
    assert [line.split()[0] for line in table.splitlines() if line.startswith(tuple(names))] == names
    assert all(figures[name]["nll_per_token"] > 0 for name in ("plain", "cold", "tilted", "extrapolated"))
    assert figures["cold"]["nll_per_token"] == figures["plain"]["nll_per_token"]
    assert figures["tilted"]["nll_per_token"] != figures["plain"]["nll_per_token"]
    assert figures["extrapolated"]["nll_per_token"] != figures["plain"]["nll_per_token"]
    assert figures["majority"]["greedy_accuracy"] is None
    prompts = figures["plain"]["length_tokens"]["count"]
    lines = {name: (out / f"samples-{name}.jsonl").read_text().splitlines() for name in names}
    assert [len(lines[name]) for name in names] == [3 * prompts, prompts, prompts, *[3 * prompts] * 3]
    plain = [json.loads(line)["text"] for line in lines["plain"]]
    assert [json.loads(line)["text"] for line in lines["tilted"]] != plain


@pytest.mark.parametrize("last", ["missing", "{sft}|tilt|reference", "{sft}|extrapolate|base"])
def test_a_missing_checkpoint_is_refused_before_the_first_policy_is_measured(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    checkpoint, *keys = last.format(sft=pair_folder / "sft").split("|")
    policy: dict[str, object] = {"checkpoint": checkpoint} | ({keys[0]: {keys[1]: "missing"}} if keys else {})
    policies = {"plain": str(pair_folder / "sft"), "last": policy}
    assert main(["evaluate", write_config(pair_folder, tmp_path / "out", policies=policies)]) == 2
    printed = capsys.readouterr().err
    assert "error: missing: no such checkpoint folder" in printed
    assert "measuring" not in printed


def test_a_checkpoint_that_is_its_own_reference_is_refused_in_one_line(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = str(pair_folder / "sft")
    policies = {"tilted": {"checkpoint": sft, "tilt": {"reference": sft}}}
    assert main(["evaluate", write_config(pair_folder, tmp_path / "out", policies=policies)]) == 2
    assert "cannot be tilted away from" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "evaluation.json").exists()
