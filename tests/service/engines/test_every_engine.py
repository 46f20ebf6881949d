"""The same requests over every engine: supported quantities are right, the others are refused."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_reward.serving.loaders import loader
from dense_reward.settings import EngineName
from model_server import ModelServer, WireFormat
from running_service import Served, served, wait_until_ready
from served_pair import SIZES, environment, free_port, write_pair

pytestmark = pytest.mark.slow

TOLERANCE_NATS = 1e-4  # float32 against float32
START_S = 600.0
"""Two engines of vLLM take a minute to start on a CPU."""
WIRE_FORMATS: dict[str, WireFormat] = {
    "vllm by its OpenAI route": "vllm",
    "vllm by its route for ids": "vllm_tokens",
    "vllm with fixed ids": "vllm_fixed_ids",
    "sglang": "sglang",
}
SCORES_CANDIDATES = {"torch", "vllm with fixed ids"}
IDS = {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 10], [], [9, 9], [8, 11, 12, 13]]}
CANDIDATES = [[[1, 2], [3, 4], [5, 6]], [], [[20, 21], [22, 23]], [[1, 1], [2, 2], [3, 3], [4, 4]]]
MANY = [[list(range(t, t + 50)) for t in range(len(ids))] for ids in ([8, 9, 10], [], [9, 9], [8, 11, 12, 13])]
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "12+34=", "responses": ["46", "47 or so", ""]},
    "ids": IDS,
    "a masked stream": {"token_ids": [5, 6, 7, 8, 9, 10, 11], "score_mask": [0, 0, 1, 0, 1, 1, 0]},
    "every token of a text": {"text": "1+1=2"},
    "several": {"items": [IDS, {"prompt": "1+2=", "response": "3"}, IDS]},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, sizes=SIZES.model_copy(update={"hidden_size": 64}))  # vLLM's smallest head size
    return folder


@pytest.fixture(scope="module")
def oracle(pair: Path) -> Iterator[Served]:
    with served(loader("torch"), sft=pair / "sft", reference=pair / "reference") as running:
        yield running


REAL = ["vllm in process", "vllm serve", "vllm serve with its route for ids"]


@pytest.fixture(
    scope="module", params=["torch", *WIRE_FORMATS, *(pytest.param(n, marks=pytest.mark.vllm) for n in REAL)]
)
def engine(request: pytest.FixtureRequest, pair: Path) -> Iterator[tuple[str, Served]]:
    """Its name, and the service over it."""
    name: str = request.param
    settings: dict[str, Any] = {"sft": pair / "sft", "reference": pair / "reference"}
    kind: EngineName = "torch" if name == "torch" else "vllm" if name == "vllm in process" else "remote"
    if kind == "vllm":
        settings["vllm_options"] = json.dumps({"enforce_eager": True})
    with ExitStack() as stack:
        if kind == "remote":
            for role in ("sft", "reference"):
                settings[f"{role}_url"] = stack.enter_context(model_server(pair / role, name))
        running = stack.enter_context(served(loader(kind), ready=False, engine=kind, **settings))
        wait_until_ready(running, START_S)
        yield name, running


@contextmanager
def model_server(folder: Path, name: str) -> Iterator[str]:
    """The URL of a stand-in, or of a real server."""
    if name in WIRE_FORMATS:
        with ModelServer(folder, WIRE_FORMATS[name]) as server:
            yield server.url
        return
    port = free_port()
    with vllm_serve(folder, port, *(["--enable-scale-out"] if "ids" in name else [])):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def vllm_serve(folder: Path, port: int, *flags: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Started as a module: the command `vllm` fails in the third-party build for CPUs."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    options = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log", *flags]
    with subprocess.Popen([*command, *options], env=environment()) as process:
        yield process
        process.terminate()


def rows(answer: Mapping[str, Any], name: str) -> list[list[float]]:
    return [row[name] for row in answer["results"]]


def assert_near(found: object, expected: object) -> None:
    for one, other in zip(found, expected, strict=True):  # type: ignore[call-overload]
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS)
def test_log_probs_and_rewards_are_those_of_torch(
    engine: tuple[str, Served], oracle: Served, asked: dict[str, Any]
) -> None:
    asked = asked | {"include": ["token_ids", "reward", "sft_logprob", "reference_logprob"]}
    found, expected = (running.score(asked) for running in (engine[1], oracle))
    assert (found.status_code, expected.status_code) == (200, 200), found.text
    for name in ("reward", "sft_logprob", "reference_logprob"):
        assert_near(rows(found.json(), name), rows(expected.json(), name))
    assert rows(found.json(), "token_ids") == rows(expected.json(), "token_ids")
    assert any(abs(value) > 0.1 for row in rows(found.json(), "reward") for value in row)


@pytest.mark.parametrize("candidates", [CANDIDATES, MANY], ids=["two at a token", "more than vLLM takes at once"])
def test_rewards_of_candidates_are_given_where_the_engine_has_them(
    engine: tuple[str, Served], oracle: Served, candidates: list[list[list[int]]]
) -> None:
    name, running = engine
    asked = {**IDS, "candidate_ids": candidates}
    found = running.score(asked)
    if name not in SCORES_CANDIDATES:
        assert found.status_code == 422
        assert found.json()["error"]["code"] == "unsupported_by_engine"
        return
    assert found.status_code == 200, found.text
    expected = oracle.score(asked).json()
    for row, other in zip(found.json()["results"], expected["results"], strict=True):
        assert ("candidate_reward" in row) == ("candidate_reward" in other) == bool(row["length"])
        assert_near(row.get("candidate_reward", []), other.get("candidate_reward", []))


@pytest.mark.parametrize(
    "options",
    [{"include": ["kl"]}, {"signal": "centred"}, {"include": ["entropy"]}, {"include": ["varentropy"]}, {"top_k": 2}],
)
def test_what_only_both_distributions_give_is_refused_where_nobody_has_them(
    engine: tuple[str, Served], options: dict[str, Any]
) -> None:
    name, running = engine
    answer = running.score(IDS | options)
    if name == "torch":
        assert answer.status_code == 200
        return
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unsupported_by_engine")


def test_models_tell_what_the_engine_can_do(engine: tuple[str, Served]) -> None:
    name, running = engine
    (card,) = running.client.get("/models").json()["models"]
    assert ("candidate_reward" in card["quantities"]) == (name in SCORES_CANDIDATES)
    assert ("kl" in card["quantities"]) == (name == "torch")
    assert card["max_length_tokens"] == {"torch": 96, "sglang": 96 - 7}.get(name, 95)


def test_a_sequence_that_is_too_long_is_refused_before_it_is_sent(engine: tuple[str, Served]) -> None:
    answer = engine[1].score({"prompt_ids": [5] * 50, "response_ids": [[6] * 50]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_long")


def test_a_heatmap_is_drawn(engine: tuple[str, Served]) -> None:
    answer = engine[1].client.post("/heatmap", json={"prompt": "1+1=", "response": "2", "format": "html"})
    assert answer.status_code == 200
    assert "<html" in answer.text
