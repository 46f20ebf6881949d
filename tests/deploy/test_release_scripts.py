"""The scripts that the chart's pods run: the check of `helm test`, against the real service, and adoption of models."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ask
import httpx2
import pytest
import torch
from dense_reward import AnswerError, Client
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import load_manifest
from running_service import Served, served
from tiny_models import CHAT, tiny_model, write_tokenizer

pytestmark = pytest.mark.slow

FILES = Path(__file__).resolve().parents[2] / "helm" / "dense-reward" / "files"
KEY = "a-key-of-the-test-of-the-chart"


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the commands of this Python first, and without proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **more}


def asking(
    running: Served, patience_s: int = 20, key: str | None = None, keys: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs the command of `helm test` against a service."""
    command: Sequence[str] = [sys.executable, str(FILES / "ask.py"), str(running.client.base_url), str(patience_s)]
    command = [*command, *([] if keys is None else [str(keys)])]
    known = environment() if key is None else environment(REWARD_KEY=key)
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


def test_the_test_passes_against_a_service_that_answers_as_it_must() -> None:
    with served() as running:
        done = asking(running)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^default: \d+ rewards, ", done.stdout, re.MULTILINE)) == 2


def test_the_test_asks_with_its_key_and_fails_without(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "test", "key": KEY, "rights": ["score"]}]))
    with served(api_keys_file=keys) as running:
        assert asking(running, key=KEY).returncode == 0
        refused = asking(running)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "unauthorized" in refused.stderr.lower()


def test_the_test_finds_a_key_in_the_services_list(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    others = [{"name": "operator", "key": f"{KEY}-of-another", "rights": ["admin"]}]
    keys.write_text(json.dumps([*others, {"name": "test", "key": KEY}]))
    with served(api_keys_file=keys) as running:
        assert asking(running, keys=keys).returncode == 0
        keys.write_text(json.dumps(others))
        assert "has no key with the right to score" in asking(running, keys=keys).stderr


def test_the_test_fails_where_nobody_answers() -> None:
    with served() as running:
        pass
    assert asking(running, patience_s=1).returncode != 0


@pytest.mark.parametrize("wrong", ["reward", "sft_logprob"])
def test_the_test_fails_where_rewards_are_not_the_differences_of_log_probs(wrong: str) -> None:
    """A transport between client and service changes one number."""
    with served() as running:

        def forward(request: httpx2.Request) -> httpx2.Response:
            headers = {"content-type": "application/json"}
            answer = running.client.post(request.url.path, content=request.content, headers=headers).json()
            for result in answer["results"]:
                result[wrong][-1] += 0.5
            return httpx2.Response(200, json=answer)

        transport = httpx2.MockTransport(forward)
        with (
            Client("http://between", encoding="float", transport=transport) as client,
            pytest.raises(AnswerError, match="but sft_logprob - reference_logprob is"),
        ):
            ask.check(client, "default")


def adopting(checkpoints: Path, sft: Path, reference: Path) -> "subprocess.CompletedProcess[str]":
    """Runs the download script of a pod, with folders instead of hub ids."""
    folders = {"CHECKPOINTS": str(checkpoints), "SFT_FOLDER": "sft", "REFERENCE_FOLDER": "runs/half"}
    asked = {"SFT": str(sft), "REFERENCE": str(reference), "RUN_ID": "mine", "RENDERER": ""}
    command = ["sh", "-e", "-c", (FILES / "adopt.sh").read_text("utf-8")]
    known = environment(**folders, **asked)
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


@pytest.mark.story
def test_a_pod_adopts_both_models_as_one_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        tiny_model(seed=seed, dtype=torch.float32).save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, template=CHAT)
    served_from = tmp_path / "checkpoints"
    stopped = adopting(served_from, tmp_path / "a", tmp_path / "missing")
    assert stopped.returncode != 0
    assert "missing" in stopped.stderr
    written = (served_from / "sft" / MANIFEST_NAME).read_bytes()
    done = adopting(served_from, tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert (served_from / "sft" / MANIFEST_NAME).read_bytes() == written
    sft, reference = (load_manifest(served_from / folder) for folder in ("sft", "runs/half"))
    assert (sft.role, reference.role) == ("sft", "reference")
    assert sft.run_id == reference.run_id == "mine"
