"""What a teacher's answer takes: bounded before arrays exist, held in the queue, written part by part."""

import json
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pytest
from dense_reward.engines.fake import FakeTeacher
from dense_reward.errors import RequestError
from dense_reward.records import Trunk, Wants, Work
from dense_reward.teacher.questions import ENTRIES_PER_TOKEN, list_fragment
from dense_reward.teacher.sglang import SglangRequest
from running_service import Served, served

IDS = [7, 3, 250, 9]
SGLANG: dict[str, Any] = {
    "input_ids": IDS,
    "sampling_params": {"max_new_tokens": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}
COMPLETION: dict[str, Any] = {"prompt": [IDS, [1, 2]], "max_tokens": 1, "prompt_logprobs": 5}
GENERATE: dict[str, Any] = {"token_ids": IDS, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 5}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", COMPLETION),
    "generate": ("/inference/v1/generate", GENERATE),
    "SGLang": ("/generate", SGLANG | {"top_logprobs_num": 4, "token_ids_logprob": [4, 5]}),
    "ids of each position": ("/generate", SGLANG | {"token_ids_logprob_positions": [[], [4, 5], [], [6]]}),
    "no ids of positions": ("/generate", SGLANG | {"token_ids_logprob_positions": [[], [], [], []]}),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.mark.parametrize(
    "requested",
    [
        {"input_ids": [[1] * 4000] * 40, "token_ids_logprob": [1] * 1024},
        {"input_ids": [1] * 4096, "token_ids_logprob_positions": [[]] * 4095 + [[1] * 1024]},
    ],
    ids=["for all positions", "for each position"],
)
def test_requested_ids_are_counted_before_their_arrays_exist(service: Served, requested: dict[str, Any]) -> None:
    request = SglangRequest.model_validate(SGLANG | requested)
    scorer = service.service.scorer("default")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="log-probs; the limit is 4000000: ask for fewer ids at each token"):
            request.question(scorer)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_queue_holds_room_for_the_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    prepare = FakeTeacher.prepare

    def watched(teacher: FakeTeacher, trunks: Sequence[Trunk], wants: Wants) -> Work:
        held.append(running.service.batcher.admission.held_tokens)
        return prepare(teacher, trunks, wants)

    monkeypatch.setattr(FakeTeacher, "prepare", watched)
    for capacity in (1000, 50):  # an answer that is larger than the queue is no reason to refuse its request
        with served(max_queue_tokens=capacity) as running:
            for k in (0, 1024):
                body = COMPLETION | {"prompt": IDS, "prompt_logprobs": k}
                assert running.client.post("/v1/completions", json=body).status_code == 200
            assert running.service.batcher.admission.held_tokens == 0
    assert held[0] == held[2] < 10
    assert held[1::2] == [held[0] + 3 * 1025 // ENTRIES_PER_TOKEN, 50]


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_in_many_parts_is_the_same(service: Served, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    route, body = REQUESTS[name]

    def answer() -> str:
        text = service.client.post(route, json=body, headers={"X-Request-Id": "one"}).text
        return re.sub(r'"created":\d+', "", text)

    whole = answer()
    for module in ("questions", "entries"):
        monkeypatch.setattr(f"dense_reward.teacher.{module}.PART_ENTRIES", 1)
    assert answer() == whole
    assert "log" in whole


@pytest.mark.parametrize("rows", [[], [None], [[1], None, {"a": 2}]])
def test_a_list_in_parts_is_a_list(rows: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 100):
        monkeypatch.setattr("dense_reward.teacher.questions.PART_ENTRIES", size)
        assert json.loads(orjson.dumps(list_fragment(rows, 1))) == rows
