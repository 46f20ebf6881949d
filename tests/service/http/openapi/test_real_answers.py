"""Real answers are as the OpenAPI document says. The client of `served` holds every answer of every test to it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
from dense_reward.http.openapi.answers import ScoredResponse
from dense_reward.http.openapi.examples import examples
from dense_reward.schemas import ArrayName, SignalName
from example_requests import IDS
from recorded_examples import assert_alike, recorded
from running_service import Served, served

DETAILS = {"top_k": 2, "candidate_ids": [[[1, 2]] * 3, [[1, 2]] * 3], "segments": [[[0, 1]], [[0, 2]]]}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_every_array_and_every_signal_is_described(service: Served, encoding: str) -> None:
    seen: set[str] = set()
    for signal in get_args(SignalName):
        for name in get_args(ArrayName):
            body = IDS | DETAILS | {"include": [name], "signal": signal, "encoding_format": encoding}
            answer = service.score(body)
            assert answer.status_code == 200, answer.text
            seen |= {key for row in answer.json()["results"] for key in row}
    assert seen == set(ScoredResponse.__annotations__), "a key that no answer has must not be described"


def test_an_answer_without_tokens_and_one_with_a_failed_item_are_described(service: Served) -> None:
    empty = {"prompt_ids": [1], "response_ids": [[]]}
    body = {"items": [empty, {"prompt_ids": [], "response_ids": [[1]]}], "on_error": "per_item"}
    rows = service.score(body).json()["results"]
    assert (rows[0]["mean"], rows[0]["min"], rows[0]["length"]) == (None, None, 0)
    assert rows[1]["error"]["code"] == "empty_prompt"


@pytest.mark.slow
def test_the_examples_of_the_document_are_true(tmp_path: Path) -> None:
    """Each request is sent again, and must get the answer that the document shows (`make openapi` records them)."""
    now = list(recorded(tmp_path))
    assert [one.name for one in now] == [one.name for one in examples()]
    for one, shown in zip(now, examples(), strict=True):
        assert_alike(asdict(one), asdict(shown), one.name)
