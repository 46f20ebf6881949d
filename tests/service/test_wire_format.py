"""The wire format 1.0: requests and answers that were stored once must stay valid as long as the major version is 1.

tests/data/wire_1.0.json holds, for each form of an item, a request of the client and the answer of the service with its
fake engine. `python tests/service/test_wire_format.py` writes it again: only for a new major version.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx2
import numpy as np
import pytest
from dense_reward.client.client import Client
from dense_reward.client.requests import ScoreOptions
from dense_reward.client.results import Scored
from dense_reward.schemas import WIRE_VERSION, ArrayName
from running_service import Served, served

FILE = Path(__file__).parents[1] / "data" / "wire_1.0.json"
ARRAYS: list[ArrayName] = ["token_ids", "reward", "sft_logprob", "reference_logprob", "kl", "entropy"]
OPTIONS = ScoreOptions(include=ARRAYS, top_k=2)
ITEMS: dict[str, dict[str, object]] = {
    "prompt": {"prompt": "2+2=", "responses": ["4", "5"]},
    "messages": {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
    "ids": {"prompt_ids": [1, 2], "response_ids": [[3, 4, 5], []], "segments": [[[0, 2]], []]},
    "candidates": {"prompt_ids": [1, 2], "response_ids": [[3, 4]], "candidate_ids": [[[5, 6], [7, 8]]]},
    "stream": {"token_ids": [1, 2, 3, 4], "score_mask": [0, 1, 0, 1]},
    "text": {"text": "2+2=4"},
}
# What depends on time or on the version of the service.
VOLATILE = {"id", "timing", "wire_version"}


def stored() -> Mapping[str, Mapping[str, str]]:
    found: Mapping[str, Mapping[str, str]] = json.loads(FILE.read_text())
    return found


def exchanged(name: str, transport: httpx2.BaseTransport) -> Scored:
    """What the client makes of the answer to an item."""
    with Client("http://service", encoding="base64" if name == "ids" else "float", transport=transport) as client:
        return client.score_items([ITEMS[name]], options=OPTIONS)


def record(service: Served) -> dict[str, dict[str, str]]:
    """Every request of the client, and the answer of a service."""
    found = {}
    for name in ITEMS:
        bodies: list[str] = []

        def pass_on(request: httpx2.Request, bodies: list[str] = bodies) -> httpx2.Response:
            answer = service.client.post("/score", content=request.content, headers=dict(request.headers))
            bodies.extend([request.content.decode(), answer.text])
            return httpx2.Response(answer.status_code, content=answer.content)

        exchanged(name, httpx2.MockTransport(pass_on))
        found[name] = {"request": bodies[0], "answer": bodies[1]}
    return found


def assert_holds(now: object, before: object, place: str = "") -> None:
    """Everything that an answer had is still there, with the same meaning; more keys are allowed."""
    if isinstance(before, dict):
        assert isinstance(now, dict), place
        for name, value in before.items():
            if name not in VOLATILE:
                assert name in now, f"{place}.{name} is gone"
                assert_holds(now[name], value, f"{place}.{name}")
    elif isinstance(before, list):
        assert isinstance(now, list), place
        assert len(now) == len(before), place
        for index, (one, other) in enumerate(zip(now, before, strict=True)):
            assert_holds(one, other, f"{place}[{index}]")
    elif isinstance(before, float):
        assert now == pytest.approx(before, abs=1e-5), place
    else:
        assert now == before, place


def test_the_version_is_that_of_the_file() -> None:
    assert WIRE_VERSION.split(".")[0] == "1", "store new requests and answers, and keep those of version 1"
    assert list(stored()) == list(ITEMS)


def test_the_service_still_answers_each_request_alike() -> None:
    with served() as service:
        for name, exchange in stored().items():
            answer = service.client.post(
                "/score", content=exchange["request"], headers={"content-type": "application/json"}
            )
            assert answer.status_code == 200, (name, answer.text)
            assert_holds(answer.json(), json.loads(exchange["answer"]), name)
            assert answer.json()["wire_version"] == WIRE_VERSION


@pytest.mark.parametrize("name", ITEMS)
def test_the_client_still_reads_each_answer_alike(name: str) -> None:
    answer = stored()[name]["answer"]
    scored = exchanged(name, httpx2.MockTransport(lambda _: httpx2.Response(200, text=answer)))
    rows = json.loads(answer)["results"]
    assert [(one.item, one.response, one.length) for one in scored.results] == [
        (row["item"], row["response"], row["length"]) for row in rows
    ]
    for one, row in zip(scored.results, rows, strict=True):
        assert one.sum == pytest.approx(row["sum"])
        assert one.reward is not None
        assert float(np.sum(one.reward)) == pytest.approx(row["sum"], abs=1e-5)


if __name__ == "__main__":
    with served() as running:
        FILE.write_text(json.dumps(record(running), indent=1) + "\n")
    sys.exit(0)
