"""The parts of `make reliability` that decide which answers are right, and the results file."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import pytest

from bench.circumstances import write_stage
from bench.reliability import __main__ as command
from bench.reliability import bad_clients
from bench.reliability.load import Known, Outcome, ask, requests
from bench.reliability.server import percentile


def test_requests_are_all_different_and_always_the_same() -> None:
    made = requests(100)
    assert len({json.dumps(known.body) for known in made}) == 100
    assert [known.body for known in made] == [known.body for known in requests(100)]
    for known in made:
        responses = known.body["response_ids"]
        assert isinstance(responses, list)
        assert known.tokens == sum(map(len, responses))


@pytest.mark.parametrize(
    ("rewards", "right"),
    [
        ([[0.5, -1.0], []], True),
        ([[0.5001, -1.0], []], True),
        ([[0.502, -1.0], []], False),
        ([[0.5], []], False),
        ([[0.5, -1.0]], False),
        ([[], [0.5, -1.0]], False),
    ],
)
def test_an_answer_is_right_only_with_every_reward(rewards: list[list[float]], right: bool) -> None:
    known = Known({}, 2, (np.array([0.5, -1.0]), np.zeros(0)))
    assert known.is_right({"results": [{"reward": row} for row in rewards]}) is right


def test_what_becomes_of_a_request_is_counted() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        match json.loads(request.content)["at"]:
            case "full":
                return httpx2.Response(429)
            case "broken":
                raise httpx2.ReadError("cut off")
            case "gone":
                raise httpx2.ConnectError("refused")
            case value:
                return httpx2.Response(200, json={"results": [{"reward": [value]}]})

    async def ask_all() -> tuple[Outcome, list[int | None]]:
        outcome = Outcome()
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://a") as client:
            asked = [Known({"at": at}, 1, (np.ones(1),)) for at in (1.0, 2.0, "full", "broken", "gone")]
            return outcome, [await ask(client, known, outcome) for known in asked]

    outcome, statuses = asyncio.run(ask_all())
    outcome.check()
    assert statuses == [200, 200, 429, None, None]
    assert (outcome.wrong, outcome.lost, outcome.answered_tokens) == (1, 1, 2)
    assert outcome.statuses == Counter({200: 2, 429: 1})
    assert (len(outcome.answered_s), len(outcome.refused_s)) == (2, 1)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(100)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 99]
    assert percentile([], 0.5) == 0.0


def test_mutated_requests_are_mostly_broken_and_still_requests() -> None:
    draw = random.Random(0)
    made = [bad_clients._request(draw, b'{"text": "a"}') for _ in range(300)]
    assert len(set(made)) > 250
    assert sum(b"HTTP/1.1" in one for one in made) > 200
    assert sum(one.endswith(b'\r\n\r\n{"text": "a"}') for one in made) > 30


def test_bodies_of_malice_are_what_they_claim() -> None:
    framed = bad_clients._framed(b"[[", b"A: b\r\n")
    head, _, body = framed.partition(b"\r\n\r\n")
    assert body == b"[["
    assert b"A: b" in head
    assert b"Content-Length: 2" in head


def test_an_experiment_is_written_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "reliability.json"
    write_stage(file, "experiments", "one", {"figures": {"wrong": 0}, "commit": "a1", "seconds": 3})
    write_stage(file, "experiments", "two", {"figures": {"lost": 1}, "commit": "a1"})
    write_stage(file, "experiments", "two", {"figures": {"lost": 0}, "commit": "b2"})
    found = json.loads(file.read_text())
    assert (found["wrong"], found["lost"]) == (0, 0)
    assert set(found["experiments"]) == {"one", "two"}
    assert found["experiments"]["one"]["seconds"] == 3
    assert [found["experiments"][name]["commit"] for name in ("one", "two")] == ["a1", "b2"]
    assert set(found) >= {"machine", "versions", "commit"}


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["overlord"])
    assert "unknown experiment 'overlord'; choose from overload" in capsys.readouterr().err
