"""Start of a service over model servers: which servers it waits for, and which it refuses."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from dense_reward.engines.remote import load, replicas
from model_server import ModelServer
from remote_service import IDS, hold, servers, serving
from running_service import Served, wait_until
from served_pair import free_port, write_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _short_intervals() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "RETRY_START_EVERY_S", 0.05)
        patch.setattr(replicas, "HEALTH_CHECK_EVERY_S", 0.05)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


def failed(running: Served) -> str:
    """Why it did not start."""
    wait_until(lambda: bool(running.failures))
    return running.service.progress


def test_a_server_that_hangs_over_its_probe_is_not_waited_for(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "VERIFY_TIMEOUT_S", 3.0)
    woken = Event()
    with servers(pair, "sft", "sft", "reference") as (one, other, reference):
        other.faults += [lambda handler: hold(handler, woken)]
        with serving(pair, f"{one.url},{other.url}", reference.url) as running:
            assert running.score(IDS).status_code == 200
            woken.set()


def test_a_replica_that_is_away_at_the_start_is_taken_when_it_comes(pair: Path) -> None:
    port = free_port()
    with servers(pair, "sft", "reference") as (one, reference):
        urls = f"{one.url},http://127.0.0.1:{port}"
        with serving(pair, urls, reference.url) as running, ModelServer(pair / "sft", port=port) as other:
            prompts = [[first, 6] for first in range(16)]

            def other_is_queried() -> bool:
                assert {running.score(IDS | {"prompt_ids": prompt}).status_code for prompt in prompts} == {200}
                return any(body.get("prompt", [])[:2] in prompts for _, body in other.requests)

            wait_until(other_is_queried)


def test_another_checkpoint_on_a_server_is_named_and_not_served(pair: Path) -> None:
    with servers(pair, "sft", "reference", "reference") as (sft, wrong, reference):
        urls = f"{sft.url},{wrong.url}", reference.url
        with serving(pair, *urls, ready=False) as running:
            assert f"sft at {wrong.url} is computed wrong" in failed(running)


def test_servers_are_waited_for(pair: Path) -> None:
    port = free_port()
    with (
        servers(pair, "reference") as (reference,),
        serving(pair, f"http://127.0.0.1:{port}", reference.url, ready=False) as running,
    ):
        wait_until(lambda: "waiting for a server" in running.client.get("/ready").json()["progress"])
        assert running.score(IDS).json()["error"]["code"] == "starting"
        with ModelServer(pair / "sft", port=port):
            wait_until(lambda: running.client.get("/ready").status_code == 200)


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ({"key": "secret"}, {}, "requires a key: pass --engine-key-file FILE"),
        ({}, {"sft_served": "other"}, "serves no model other"),
        ({}, {"sft_url": "127.0.0.1:8001"}, "--sft-url takes URLs of servers without a path, as http://HOST:8001"),
        ({}, {"sft_url": "http://127.0.0.1:8001,"}, "'' is not one"),
        ({}, {"sft_url": "http://127.0.0.1:80a"}, "is not one"),
        ({}, {"sft_url": "http://127.0.0.1:8001/v1"}, "is not one"),
        ({}, {"sft_url": "dns+https://models:8001"}, "is not one"),
        ({}, {"sft_url": "http://user:word@127.0.0.1:8001"}, "use --engine-key-file FILE instead"),
        ({}, {"engine_key_file": "no-such-file"}, "--engine-key-file cannot be read"),
        (
            {},
            {"deterministic": "true", "head_dtype": "float32"},
            "only --engine torch accepts --deterministic, --head-dtype",
        ),
    ],
)
def test_what_cannot_be_served_is_told_with_the_cure(
    pair: Path, options: dict[str, Any], settings: dict[str, str], reason: str
) -> None:
    with (
        servers(pair, "sft", "reference", **options) as (sft, reference),
        serving(pair, sft.url, reference.url, ready=False, **settings) as running,
    ):
        assert reason in failed(running)


def test_weights_that_are_here_are_checked_although_a_server_computes_them(pair: Path, tmp_path: Path) -> None:
    for role in ("sft", "reference"):
        shutil.copytree(pair / role, tmp_path / role)
    weights = tmp_path / "sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with (
        servers(pair, "sft", "reference") as (sft, reference),
        serving(tmp_path, sft.url, reference.url, ready=False) as running,
    ):
        assert "model.safetensors has" in (reason := failed(running))
        assert "it is cut off or overwritten, so copy or download it again" in reason


def test_a_key_is_sent(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    with (
        servers(pair, "sft", "reference", key="secret") as (sft, reference),
        serving(pair, sft.url, reference.url, engine_key_file=tmp_path / "key") as running,
    ):
        assert running.score(IDS).status_code == 200


def test_pairs_of_servers_are_not_loaded_over_http(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('[{"name": "a", "key": "a-long-key-for-tests", "rights": ["admin", "score"]}]')
    with servers(pair, "sft", "reference") as (sft, reference):
        keys: dict[str, Any] = {"api_keys_file": tmp_path / "keys.json", "checkpoints_folder": pair}
        with serving(pair, sft.url, reference.url, **keys) as running:
            running.client.headers["Authorization"] = "Bearer a-long-key-for-tests"
            body = {"name": "b", "sft": str(pair / "sft"), "reference": str(pair / "reference")}
            answer = running.client.post("/admin/models", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
