"""The whole path in real processes: train, serve, score over HTTP, improve a policy, measure it.

How a killed run resumes is tested in trainer/jobs.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from dense_reward import Client
from dense_reward.manifest import load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.runs.local_service import free_port

pytestmark = pytest.mark.story
TRAIN = (sys.executable, "-m", "dense_reward_trainer.cli")
SERVE = (sys.executable, "-m", "dense_reward.cli", "serve")
PATIENCE_S = 600.0


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(command: Sequence[str]) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_demonstrations_become_token_rewards_and_those_a_policy(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    finish([*TRAIN, "sft", "arithmetic_sft_tiny", f"output_dir={run}", "eval_every_steps=null", "threads=1"])
    sft, reference = run / "checkpoints" / "sft", run / "checkpoints" / "reference"
    for folder in (sft, reference):
        verify_files(folder, load_manifest(folder))
    assert load_manifest(reference).sample_fraction == pytest.approx(0.5, abs=0.1)

    port = free_port()
    serve = [*SERVE, "--sft", str(sft), "--reference", str(reference), "--port", str(port)]
    with subprocess.Popen(serve, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            score_over_http(url)
            improve_and_measure(tmp_path, run, url)
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE_S) == 0


def score_over_http(url: str) -> None:
    """Rewards and offsets for each token, equal results for equal requests, and a heatmap without injected HTML."""
    with Client(url) as client:
        client.wait_until_ready(PATIENCE_S)
        responses = ["2+5=7 write 7 carry 0", "2+5=9 write 7 carry 0"]
        by_text = client.score(prompt="Add 12 and 35.", responses=responses).results
        for result in by_text:
            assert result.offsets is not None
            assert result.reward is not None
            assert len(result.offsets) == len(result.reward) == result.length
            assert np.abs(result.reward).max() > 0
        again = client.score(prompt="Add 12 and 35.", responses=responses).results
        assert [one.sum for one in again] == [one.sum for one in by_text]
        assert "<script" not in client.heatmap([{"prompt": "Add <script>.", "responses": responses}])


def improve_and_measure(folder: Path, run: Path, url: str) -> None:
    """One DPR step; then the policy is compared with the model that it started from."""
    held_out = f"held_out={run / 'held_out.jsonl'}"
    dpr = [f"output_dir={folder / 'dpr'}", f"policy={run / 'checkpoints' / 'sft'}", f"service_url={url}", held_out]
    finish([*TRAIN, "dpr", "arithmetic_dpr_tiny", *dpr, "steps=1", "threads=1"])
    steps = [json.loads(line) for line in (folder / "dpr" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1]
    measured = [step for step in steps if "held_out_nll_per_token" in step]
    assert [step["step"] for step in measured] == [0, 1]
    assert measured[0]["held_out_kl_to_sft"] == pytest.approx(0.0, abs=1e-3)
    assert all(math.isfinite(step["held_out_nll_per_token"]) for step in measured)
    assert (folder / "dpr" / "dpr.png").read_bytes().startswith(b"\x89PNG")
    sft, policy = run / "checkpoints" / "sft", folder / "dpr" / "checkpoints" / "policy"
    assert load_manifest(policy).role == "policy"
    assert load_manifest(policy).weights_sha256 != load_manifest(sft).weights_sha256
    evaluate = [f"output_dir={folder / 'evaluate'}", f"policies={{sft: {sft}, policy: {policy}}}", held_out]
    # In this process: an import of torch takes longer than the job.
    assert main(["evaluate", "arithmetic_evaluate_tiny", *evaluate, f"service_url={url}"]) == 0
    figures = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    assert list(figures) == ["sft", "policy"]
    for result in figures.values():
        assert result.pop("pairs").keys() == {"default"}
        assert result.pop("pass_at") == {}
        numbers = [value["value"] if isinstance(value, dict) else value for value in result.values()]
        assert all(math.isfinite(number) for number in numbers), result
