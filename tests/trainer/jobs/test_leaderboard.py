"""The leaderboard job: its commands, and lm_eval itself on a tiny model and two tasks in files."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.benchmark import LeaderboardConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.jobs import leaderboard
from dense_reward_trainer.jobs.leaderboard import harness_command, leaderboard_table, read_results

RESULTS = {
    "results": {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
        "arc": {"acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4},
    },
    "n-shot": {"gsm8k": 5, "arc": 25},
    "versions": {"gsm8k": 3.0},
}


def config(**values: object) -> LeaderboardConfig:
    return LeaderboardConfig.model_validate({"output_dir": "out", "policies": {"sft": "runs/sft"}, **values})


def test_the_leaderboard_is_a_group_of_the_harness_with_its_own_shots() -> None:
    command = harness_command(config(), (Path("runs/sft"), None), Path("out/lm_eval/sft"), "cuda")
    assert command[:4] == [sys.executable, "-m", "lm_eval", "run"]
    assert " ".join(command[4:]) == (
        "--model hf --model_args pretrained=runs/sft,dtype=bfloat16 --tasks openllm --batch_size auto --device cuda "
        "--output_path out/lm_eval/sft --log_samples"
    )
    assert config(version=2).wanted == ("leaderboard",)


def test_own_tasks_have_own_shots_and_an_adapter_is_loaded_on_its_base() -> None:
    own = config(version=None, tasks=["sums", "words"], shots=2, include_path="tasks", limit=3, chat_template=True)
    command = " ".join(harness_command(own, (Path("adapter"), Path("base")), Path("out"), "cpu"))
    assert "--model_args pretrained=base,peft=adapter,dtype=bfloat16 --tasks sums,words" in command
    assert command.endswith("--num_fewshot 2 --limit 3 --include_path tasks --apply_chat_template --log_samples")


@pytest.mark.parametrize("values", [{"version": None}, {"tasks": ["sums"]}, {"shots": 3}])
def test_what_lm_eval_shall_run_is_said_once(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"set version|shots is that of tasks"):
        config(**values)


def test_the_table_has_the_harness_s_own_numbers_and_errors() -> None:
    found = read_results("lm_eval", RESULTS)
    assert found.results["arc"] == {"acc": 0.5}
    assert leaderboard_table({"sft": found, "dpr": read_results("", {"results": {}})}).splitlines() == [
        "task   shots  metric                    sft              dpr",
        "gsm8k  5      exact_match,strict-match  0.2500 ± 0.1000  -",
        "arc    25     acc                       0.5000           -",
        "± standard error, by lm_eval",
    ]


def test_without_the_harness_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "HARNESS", "no_such_harness")
    with pytest.raises(ConfigError, match=r"pip install '\.\[eval\]'"):
        leaderboard.run(config(output_dir=tmp_path / "out"), print)


def tasks(folder: Path) -> Path:
    """Two tasks of the harness with their data beside them: the likelier of two answers, and a generated one."""
    rows = [{"question": f"{a}+{a}=", "choices": [str(2 * a), "no"], "gold": 0} for a in range(1, 5)]
    data = folder / "rows.jsonl"
    folder.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    chosen = {"task": "sums", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    written = {"task": "words", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
               "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
               "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    for task in (chosen, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install '.[eval]' in the project's folder")
def test_lm_eval_measures_a_tiny_model_on_two_tasks_and_a_second_start_does_not_repeat_it(
    pair_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values = {
        "output_dir": str(tmp_path / "run"),
        "policies": {"sft": str(pair_folder / "sft"), "early": str(pair_folder / "early")},
        "version": None,
        "tasks": ["sums", "words"],
        "shots": 0,
        "include_path": str(tasks(tmp_path / "tasks")),
        "dtype": "float32",
        "batch_size": 2,
        "device": "cpu",
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    assert main(["leaderboard", str(path)]) == 0
    found = json.loads((tmp_path / "run" / "leaderboard.json").read_text())
    assert list(found) == ["sft", "early"]
    for one in found.values():
        assert 0 <= one["results"]["sums"]["acc"] <= 1
        assert 0 <= one["results"]["words"]["exact_match"] <= 1
        assert "-m lm_eval run --model hf" in one["command"]
    assert list((tmp_path / "run" / "lm_eval" / "sft").rglob("samples_sums_*.jsonl"))
    capfd.readouterr()
    assert main(["leaderboard", str(path)]) == 0
    assert "running" not in capfd.readouterr().err
