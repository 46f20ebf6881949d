"""RFT as users run it: checkpoints of each round, kills, changed inputs; the head behind a service and in credit."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import killed_job
import pytest
import yaml
from dense_reward import Client
from dense_reward.manifest import load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.reward_model import rounds
from served_pair import DATA, ServedPair, environment, free_port
from shell_command import next_commands

pytestmark = pytest.mark.slow
CHECKPOINTS = ("token_head-1", "policy-1", "token_head-2", "policy-2")


def write_config(pair_folder: Path, run: Path) -> str:
    values = {
        "output_dir": str(run),
        "policy": str(pair_folder / "sft"),
        "data": DATA,
        "held_out": str(pair_folder / "held_out.jsonl"),
        "rounds": 2,
        "held_out_pairs": 0.2,
        "max_new_tokens": 12,
        "head": {"batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-3, "warmup_steps": 1},
        "policy_steps": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-3},
        "held_out_options": {"max_new_tokens": 12, "samples_per_prompt": 1},
        "device": "cpu",
        "threads": 1,
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def finished(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["rft", write_config(pair_folder, run)]) == 0
    return run


def weights(run: Path) -> list[bytes]:
    return [(run / "checkpoints" / name / "model.safetensors").read_bytes() for name in CHECKPOINTS]


def test_each_round_leaves_its_pairs_a_head_and_a_policy(pair_folder: Path, finished: Path) -> None:
    sft = load_manifest(pair_folder / "sft")
    for name in CHECKPOINTS:
        manifest = load_manifest(finished / "checkpoints" / name)
        verify_files(finished / "checkpoints" / name, manifest)
        assert manifest.role == name.partition("-")[0]
        assert manifest.tokenizer_sha256 == sft.tokenizer_sha256
    assert len({*weights(finished)}) == 4
    rows = [[json.loads(line) for line in (finished / "pairs" / f"{n}.jsonl").read_text().splitlines()] for n in (1, 2)]
    prompts = [{tuple(row["prompt_ids"]) for row in of_round} for of_round in rows]
    assert prompts[0]
    assert not prompts[0] & prompts[1], "the rounds have disjoint shares"
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all("held_out_greedy_accuracy" in line for line in lines)
    kl = [line["held_out_kl_to_sft"] for line in lines]
    assert kl[0] == pytest.approx(0.0, abs=1e-4), "the policy is the SFT model itself"
    assert abs(kl[2]) > 1e-3
    assert {"head_loss", "head_judged_accuracy", "policy_reward_sum"} <= lines[1].keys()


def test_a_finished_run_says_what_to_serve(
    pair_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(finished)
    assert main(["rft", write_config(pair_folder, finished)]) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"finished: {finished}/checkpoints/policy-2; next: dense-reward-train evaluate ")
    assert next_commands(last)[1] == f"dense-reward serve --token-head {finished}/checkpoints/token_head-2"
    assert weights(finished) == before


def test_a_run_that_was_killed_goes_on_to_the_same_weights(pair_folder: Path, finished: Path, tmp_path: Path) -> None:
    config = write_config(pair_folder, tmp_path / "run")
    command = killed_job.command(signal.SIGKILL, 2, "rft", config)
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "checkpoints" / "policy-2").exists()
    assert main(["rft", config]) == 0
    assert weights(tmp_path / "run") == weights(finished)


STAGES = (("write", 1), ("write_pairs", 1), ("write_metrics", 0))
"""Functions that end a stage, and how often they are called before one is stopped."""


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[0]}-{stage[1]}")
def test_a_run_that_stopped_at_any_stage_goes_on_after_the_last_finished_one(
    stage: tuple[str, int], pair_folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(pair_folder, tmp_path / "run")
    done: list[Callable[..., None]] = []
    name, calls = stage
    whole = getattr(rounds, name)

    def stop_at_the_next(*args: object, **kwargs: object) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(whole)
        whole(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(rounds, name, stop_at_the_next)
        patched.setattr("dense_reward_trainer.jobs.rft.write_metrics", rounds.write_metrics)
        assert main(["rft", config]) == 130
    assert main(["rft", config]) == 0
    assert weights(tmp_path / "run") == weights(finished)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed=1", "different configuration (seed: 0 -> 1)"),
        ("rounds=3", "different configuration (rounds: 2 -> 3)"),
        ("head.batch_size=3", "head.batch_size"),
        ("head.epochs=2", "head.epochs"),
        ("head.loss=terminal", "head.loss"),
        ("data.arithmetic.demonstrations=23", "data.arithmetic.demonstrations"),
    ],
)
def test_a_changed_configuration_is_refused_on_resume(
    override: str, complaint: str, pair_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rft", write_config(pair_folder, finished), override]) == 2
    assert complaint in capsys.readouterr().err


def test_changed_pairs_are_refused_on_resume(
    pair_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "pairs" / "1.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[0]["answer_ids"][0] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert main(["rft", write_config(pair_folder, finished)]) == 2
        assert "token_head-1 has learnt from other pairs" in capsys.readouterr().err
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("policy_steps=null", "all rounds would have the same policy"),
        ("max_new_tokens=95", "max_new_tokens"),
        ("policy=missing", "no such checkpoint folder"),
        ("head.warmup_steps=500", "head.warmup_steps is 500"),
        ("data.arithmetic.demonstrations=1", "are needed"),
        ("rewards=3", "unknown key rewards"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(
    override: str, complaint: str, pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rft", write_config(pair_folder, tmp_path / "run"), override, "held_out=null"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert complaint in last


def test_several_processes_are_refused(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["rft", write_config(pair_folder, tmp_path / "run")]) == 2
    assert "rft runs in one process" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served_head(pair_folder: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPair]:
    """The head of the last round, and a pair of the SFT model, in one service."""
    listed = [
        {"name": "head", "token_head": str(finished / "checkpoints" / "token_head-2")},
        {"name": "half", "sft": str(pair_folder / "sft"), "reference": str(pair_folder / "reference")},
    ]
    path = tmp_path_factory.mktemp("listed") / "pairs.json"
    path.write_text(json.dumps(listed))
    service = ServedPair(pair_folder, free_port(), path)
    service.start()
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.kill()


def test_the_head_is_served(served_head: ServedPair, finished: Path) -> None:
    with Client(served_head.url) as client:
        names = {card.name: card.token_head for card in client.models()}
        assert names == {"head": str(finished / "checkpoints" / "token_head-2"), "half": None}


def credit(served: ServedPair, folder: Path, out: Path, **more: object) -> dict[str, object]:
    values = {
        "output_dir": str(out),
        "service_url": served.url,
        "data": {"source": str(folder / "held_out.jsonl"), "held_out_fraction": 0.0},
        "answers": 3,
        **more,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    assert main(["credit", str(path)]) == 0
    result: dict[str, object] = json.loads((out / "credit.json").read_text())["result"]
    return result


def test_credit_compares_a_head_with_pairs_and_with_the_sft_model(
    served_head: ServedPair, pair_folder: Path, tmp_path: Path
) -> None:
    result = credit(served_head, pair_folder, tmp_path / "credit")
    columns = result["localisation"]["digit"]  # type: ignore[index]
    assert {"sft_logprob", "reward:half", "reward:head"} <= columns.keys()
    assert "sft_logprob:head" not in columns


def test_credit_measures_a_head_alone(served_head: ServedPair, pair_folder: Path, tmp_path: Path) -> None:
    result = credit(served_head, pair_folder, tmp_path / "credit", service_pair="head")
    assert [*result["localisation"]["digit"]] == ["reward:head"]  # type: ignore[index]
    assert "sft_logprob" in result["left_out"]  # type: ignore[operator]
