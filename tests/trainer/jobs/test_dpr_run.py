"""DPR and evaluate as users run them: the command, a real service, kills, an outage, and mismatched pairs."""

import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import killed_job
import numpy as np
import pytest
import yaml
from dense_reward import Client
from dense_reward.manifest import load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.policy import load_policy
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.reward_service import ServiceAddress, ServiceRewards, connected, requests
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.run_folder import MetricsLog
from served_pair import DATA, ServedPair, environment, write_pair
from shell_command import next_commands

pytestmark = pytest.mark.slow
STEPS = 3


def write_config(served: ServedPair, run: Path) -> Path:
    values: Mapping[str, object] = {
        "output_dir": str(run),
        "policy": str(served.folder / "sft"),
        "service_url": served.url,
        "service_patience_s": 300,
        "prompts": DATA,
        "held_out": str(served.folder / "held_out.jsonl"),
        "steps": STEPS,
        "prompts_per_step": 3,
        "group_size": 3,
        "max_new_tokens": 12,
        "baseline": "kl",
        "learning_rate": 1e-3,
        "held_out_options": {"max_new_tokens": 12, "samples_per_prompt": 2},
        "evaluate_every": 2,
        "save_every": 1,
        "device": "cpu",
        "threads": 1,
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(served: ServedPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["dpr", str(write_config(served, run))]) == 0
    return run


def metrics_of(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def assert_same_outcome(run: Path, expected: Path) -> None:
    """Equal weights, bitwise, and each step once."""
    weights = [folder / "checkpoints" / "policy" / "model.safetensors" for folder in (run, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    steps = [(line["step"], "held_out_kl_to_sft" in line) for line in metrics_of(run)]
    assert steps == [(line["step"], "held_out_kl_to_sft" in line) for line in metrics_of(expected)]


def test_a_run_leaves_a_policy_its_metrics_and_a_plot(served: ServedPair, finished: Path) -> None:
    lines = metrics_of(finished)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "held_out_kl_to_sft" in line] == [0, 2, 3]
    assert lines[0]["held_out_kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    assert lines[-1]["held_out_kl_to_sft"] != 0.0
    assert (finished / "dpr.png").stat().st_size > 10_000
    assert not (finished / "resume").exists(), "a finished run needs no state"

    folder = finished / "checkpoints" / "policy"
    manifest, sft = load_manifest(folder), load_manifest(served.folder / "sft")
    verify_files(folder, manifest)
    assert (manifest.role, manifest.optimiser_step) == ("policy", STEPS)
    assert manifest.tokenizer_sha256 == sft.tokenizer_sha256
    assert manifest.weights_sha256 != sft.weights_sha256
    assert [s.prompt_ids for s in manifest.probe] == [s.prompt_ids for s in sft.probe]


def test_the_gradient_of_a_run_is_asked_before_it(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_config(served, tmp_path / "run"))
    assert main(["gradient", recipe, "batches=3"]) == 0
    record = json.loads((tmp_path / "run" / "gradient.json").read_text())
    assert list(record["alignments"]) == ["default"]
    assert -1 <= record["alignments"]["default"]["cosine"] <= 1
    assert record["rewards"]["default"]["sft"] == str(served.folder / "sft")
    assert "of the expected gradient" in capsys.readouterr().err
    assert main(["dpr", recipe]) == 2
    assert "gradient" in capsys.readouterr().err
    assert main(["gradient", recipe, "batches=3", "held_out=null", f"output_dir={tmp_path}/other"]) == 2
    assert "held_out is null" in capsys.readouterr().err


def test_a_run_on_a_service_of_several_pairs_must_name_one(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dpr", str(write_config(served_run, tmp_path / "run"))]) == 2
    assert "it serves several pairs: set service_pair to one of half, early" in capsys.readouterr().err


def test_the_gradients_of_all_references_are_compared_on_the_same_samples(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_config(served_run, tmp_path / "run"))
    assert main(["gradient", recipe, "batches=3", "signal=sft_logprob"]) == 0
    record = json.loads((tmp_path / "run" / "gradient.json").read_text())
    assert list(record["alignments"]) == list(record["rewards"]) == ["half", "early"]
    assert record["rewards"]["early"]["reference"] == str(served_run.folder / "early")
    half, early = record["alignments"].values()
    assert half["cosines"] == pytest.approx(early["cosines"], abs=0.005), "sft_logprob does not depend on the reference"
    reported = capsys.readouterr().err
    assert "dense-reward-train credit" in reported
    assert main(["gradient", recipe, "batches=3", "service_pair=early", f"output_dir={tmp_path}/one"]) == 0
    assert list(json.loads((tmp_path / "one" / "gradient.json").read_text())["alignments"]) == ["early"]


def test_a_finished_run_is_left_alone(served: ServedPair, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    # The state after a kill between the last checkpoint and the removal of the training states.
    (finished / "resume").mkdir()
    assert main(["dpr", str(write_config(served, finished))]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert not (finished / "resume").exists()


@pytest.mark.parametrize(
    ("ending", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["killed", "interrupted"]
)
def test_a_gradient_that_was_stopped_keeps_its_pairs_and_ends_alike(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: signal.Signals, code: int
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert main(["gradient", str(write_config(served_run, unbroken)), "batches=3"]) == 0
    config = str(write_config(served_run, run))
    command = killed_job.command(ending, "half.json", "gradient", config, "batches=3")
    stopped = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (run / "gradient.json").exists()
    capsys.readouterr()
    assert main(["gradient", config, "batches=3"]) == 0
    printed = capsys.readouterr().err
    assert "3 batches with the reference early" in printed
    assert "3 batches with the reference half" not in printed
    assert printed.splitlines()[-1].startswith(f"finished: {run / 'gradient.json'}; next: ")
    next_commands(printed.splitlines()[-1])
    assert (run / "gradient.json").read_bytes() == (unbroken / "gradient.json").read_bytes()


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    served: ServedPair, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = str(write_config(served, run))
    command = killed_job.command(signal.SIGKILL, 2, "dpr", config)
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "checkpoints" / "policy").exists()
    assert main(["dpr", config]) == 0
    assert "resuming after step 1" in capsys.readouterr().err
    assert_same_outcome(run, finished)
    assert (run / "dpr.png").stat().st_size > 10_000


def test_a_service_that_goes_away_costs_no_step(
    served: ServedPair, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is killed after the first step, and is back once it has loaded the pair again."""
    append, outages = MetricsLog.append, []

    def append_and_cut_the_power(log: MetricsLog, step: int, values: Mapping[str, float | None]) -> None:
        append(log, step, values)
        if step == 1:
            outages.append(step)
            served.kill()
            served.start()

    monkeypatch.setattr(MetricsLog, "append", append_and_cut_the_power)
    run = tmp_path / "run"
    assert main(["dpr", str(write_config(served, run))]) == 0
    assert outages == [1]
    assert_same_outcome(run, finished)


def test_evaluate_compares_policies_side_by_side(
    served: ServedPair, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "evaluation", tmp_path / "evaluate.yaml"
    sft, reference = str(served.folder / "sft"), str(served.folder / "reference")
    best = {name: {"samples": 5, "by": name, "aggregate": "min"} for name in ("reward", "entropy_corrected")}
    policies = {
        "sft": sft,
        "policy": str(finished / "checkpoints" / "policy"),
        "tilted": {"checkpoint": sft, "tilt": {"reference": reference, "strength": 0.5}},
        **{name: {"checkpoint": sft, "choose": choose} for name, choose in best.items()},
    }
    values: Mapping[str, object] = {
        "output_dir": str(out),
        "policies": policies,
        "held_out": str(served.folder / "held_out.jsonl"),
        "service_url": served.url,
        "held_out_options": {"max_new_tokens": 12, "samples_per_prompt": 2},
        "device": "cpu",
    }
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["evaluate", str(config)]) == 0
    printed = capsys.readouterr().err
    assert "measuring sft, reward, entropy_corrected (" in printed
    pinned = re.findall("waiting for http|measuring", printed)
    assert pinned == ["waiting for http"] * 2 + ["measuring"] * 3, "all rows have the same models of the service"
    assert re.search(r"policy +greedy accuracy +sampled accuracy +NLL per token +KL to SFT", printed)
    assert "NLL in nats per token, KL in nats per response" in printed
    assert f"KL to SFT: to the SFT model of the service, {sft}" in printed
    figures = json.loads((out / "evaluation.json").read_text())
    assert list(figures) == list(policies)
    assert figures["tilted"]["kl_to_sft"]["value"] > 0.1
    assert figures["reward"]["kl_to_sft"] is None
    assert figures["sft"]["kl_to_sft"]["value"] == pytest.approx(0.0, abs=1e-4)
    logged = metrics_of(finished)[-1]
    assert figures["policy"]["kl_to_sft"]["value"] == pytest.approx(logged["held_out_kl_to_sft"], abs=1e-4)
    assert figures["policy"]["nll_per_token"] == pytest.approx(logged["held_out_nll_per_token"], abs=1e-5)
    texts = {
        name: [json.loads(s)["text"] for s in (out / f"samples-{name}.jsonl").read_text().splitlines()]
        for name in policies
    }
    assert texts["reward"] != texts["entropy_corrected"], "two signals choose from the same samples"
    assert len(texts["reward"]) == figures["reward"]["length_tokens"]["count"]
    assert len(texts["policy"]) == 3 * figures["policy"]["length_tokens"]["count"]


def ignore(_: str) -> None:
    """A report that is not checked."""


@pytest.fixture
def rewards(served: ServedPair) -> Iterator[ServiceRewards]:
    tokenizer = load_manifest(served.folder / "sft").tokenizer_sha256
    address = ServiceAddress(served.url, None, 60, 60, 8192)
    with connected(address, tokenizer, ignore, signal="centred", with_kl=True) as connection:
        yield connection


def test_the_service_answers_for_the_very_ids_of_each_rollout(served: ServedPair, rewards: ServiceRewards) -> None:
    checkpoint = load_policy(served.folder / "sft", precision="float32", device="cpu")
    prompts = [checkpoint.encoder.prompt(text) for text in ("Add 1 and 2.", "Add 33 and 4.")]
    rollouts = sample(checkpoint.policy, prompts, Sampling(12, group_size=3), seed=0)
    # Two items with one prompt, next to each other, must not be confused.
    rollouts = [*rollouts, rollouts[0]]
    scored = rewards.score(rollouts)
    with Client(served.url) as client:
        for rollout, row in zip(rollouts, scored, strict=True):
            single = client.score_ids(rollout.prompt_P, [rollout.response_T]).results[0]
            assert single.reward is not None
            assert row.kl_T is not None
            assert len(row.signal_T) == len(row.sft_logprob_T) == len(row.kl_T) == len(rollout.response_T)
            np.testing.assert_allclose(row.signal_T + row.kl_T, single.reward, atol=1e-4)


def test_many_rollouts_are_asked_for_in_several_requests(rewards: ServiceRewards) -> None:
    rollouts = [Rollout(np.array([5, i], np.int32), np.array([7, 8], np.int32), False) for i in range(6)]
    whole = rewards.score(rollouts)
    assert [len(items) for items in requests(rollouts, 9)] == [2, 2, 2]
    parts = replace(rewards, pair=replace(rewards.pair, request_tokens=9)).score(rollouts)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.signal_T, other.signal_T, atol=1e-5)


def test_a_pair_that_was_swapped_under_a_run_is_refused(rewards: ServiceRewards) -> None:
    card = rewards.card.model_copy(update={"revision": "another"})
    swapped = replace(rewards, pair=replace(rewards.pair, card=card))
    with pytest.raises(JobError, match=r"did not score: 409 revision_mismatch"):
        swapped.score([Rollout(np.array([5], np.int32), np.array([7], np.int32), False)])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("policy={foreign}", "your tokenizer has sha256 .*, default was trained with"),
        ("service_pair=other", "'other' does not name one pair"),
        ("service_url=ftp://nowhere", "service_url: .* has no http"),
        ("service_url=nonsense", "service_url: .* has no http"),
        ("max_new_tokens=90", "set max_new_tokens to at most"),
        ("prompts.held_out_fraction=0.0", "held-out prompts are also trained on"),
        ("held_out=missing.jsonl", "held_out is missing.jsonl, but there is no such file"),
        ("policy=missing", "no such checkpoint folder"),
        ("stepz=3", "did you mean steps"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    if "{foreign}" in override:
        write_pair(tmp_path / "foreign", vocab_size=270)
    chosen = override.format(foreign=tmp_path / "foreign" / "sft")
    assert main(["dpr", str(write_config(served, tmp_path / "run")), chosen]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(complaint, last), last
    assert not metrics_of(tmp_path / "run")


def test_the_cure_that_is_printed_for_bad_prompts_is_one(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Add 1 and 1.", "response": "2"}\n{"prompt": "Add 0 and 1.", "response": ""}\n')
    command = ["dpr", str(write_config(served, tmp_path / "run"))]
    given = [f"prompts={{source: {path}, held_out_fraction: 0}}", "steps=1"]
    assert main([*command, *given]) == 2
    cure = re.search(r"add (--\S+) to the command", capsys.readouterr().err)
    assert cure is not None
    assert main([*command, cure[1], *given]) == 0


def test_bad_lines_of_what_is_measured_on_are_not_said_to_be_skippable(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "Add 1 and 1."}\n')
    assert main(["dpr", str(write_config(served, tmp_path / "run")), f"held_out={path}", "--skip-bad"]) == 2
    reported = capsys.readouterr().err
    assert "Correct or remove them" in reported
    assert "--skip-bad" not in reported


def test_a_service_that_is_too_slow_is_told_of_with_the_option_that_helps(rewards: ServiceRewards) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with Client(f"http://127.0.0.1:{port}", timeout_s=0.2, retry_for_s=0.0) as client:
            slow = replace(rewards, pair=replace(rewards.pair, client=client))
            with pytest.raises(JobError, match="raise service_timeout_s, or lower service_request_tokens"):
                slow.score([Rollout(np.array([5], np.int32), np.array([7], np.int32), False)])


def test_a_run_is_not_resumed_with_another_configuration_or_another_reward_model(
    served: ServedPair, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "policy" / "manifest.json").unlink()
    config = str(write_config(served, run))
    assert main(["dpr", config, f"steps={STEPS + 1}"]) == 2
    assert f"a different configuration (steps: {STEPS} -> " in capsys.readouterr().err
    record = run / "run.json"
    record.write_text(re.sub(r'("reward model": ")[^"]+', r"\1other", record.read_text()))
    assert main(["dpr", config]) == 2
    assert "started with different inputs (reward model)" in capsys.readouterr().err
