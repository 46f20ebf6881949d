"""Limits on what one caller can use of a real server: queue, time, and the size of an answer."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import orjson
import pytest
from dense_reward.engines.fake import FakeEngine, FakeTokenizer
from dense_reward.http.bodies import fragment
from dense_reward.records import OnDevice
from dense_reward.serving.loaders import LoadedPair
from dense_reward.serving.service import Service
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder
from dense_reward.text.offsets import Span
from dense_reward.text.tokenizer import Pieces
from faulty_engines import Gate, Recorder
from running_service import PATIENCE_S, Served, loading, served, wait_until

IDS = {"prompt_ids": [1] * 50, "response_ids": [[2] * 20, [3] * 20]}


def refusal(answer: httpx2.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@contextmanager
def sending(running: Served, declared: int, body: bytes) -> Iterator[socket.socket]:
    """A caller that declares `declared` bytes, and sends only `body`."""
    with socket.create_connection((running.client.base_url.host, running.client.base_url.port or 0)) as caller:
        head = (
            f"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {declared}\r\n\r\n"
        )
        caller.sendall(head.encode() + body)
        caller.settimeout(PATIENCE_S)
        yield caller


def test_a_full_queue_refuses_a_body_that_has_not_come() -> None:
    gate = Gate()
    with served(loading(Recorder(gate)), max_queue_tokens=90) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        with sending(running, 1_000_000, b"{") as caller:
            assert caller.recv(12) == b"HTTP/1.1 429"
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert running.service.batcher.admission.held_tokens == 0


def test_a_body_that_is_only_promised_takes_no_room_from_others() -> None:
    with served(max_queue_tokens=100) as running:
        with sending(running, 1_000_000, b" " * 40):
            wait_until(lambda: running.service.batcher.admission.held_tokens == 10)
            assert running.score(IDS).status_code == 200
        wait_until(lambda: running.service.batcher.admission.held_tokens == 0)


def test_a_large_body_is_read_as_a_small_one() -> None:
    with served() as running:
        for padding in (0, 200_000):
            body = json.dumps(IDS).encode().ljust(padding)
            answer = running.client.post("/score", content=body, headers={"Content-Type": "application/json"})
            assert [row["length"] for row in answer.json()["results"]] == [20, 20]
            answer = running.client.post("/score", content=b"{" + body, headers={"Content-Type": "application/json"})
            assert refusal(answer)[:2] == (400, "invalid_json")


@pytest.mark.parametrize(("length", "top_k", "thread"), [(20, 0, "server"), (3000, 0, "encode_"), (150, 20, "encode_")])
def test_a_large_answer_is_serialised_in_a_thread_and_equals_small_ones(
    length: int, top_k: int, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def recorded(row: Mapping[str, object]) -> orjson.Fragment:
        threads.add(threading.current_thread().name)
        return fragment(row)

    monkeypatch.setattr("dense_reward.http.app.fragment", recorded)
    item = {"prompt_ids": [1] * 50, "response_ids": [[2] * length, [3] * length]}
    with served(loading(Recorder())) as running:
        rows = running.score({"items": [item, item], "top_k": top_k}).json()["results"]
    assert [(row["item"], row["response"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row["reward"] for row in rows] == [[-1.0] * length, [-2.0] * length] * 2
    assert [len(row.get("alternatives", [])) for row in rows] == [length if top_k else 0] * 4
    assert len(threads) == 1
    assert threads.pop().startswith(thread)


class QueueObserver(FakeTokenizer):
    """Records the service's held tokens whenever it decodes `prompt`. Fails if it is given a long text to encode."""

    service: Service

    def __init__(self, prompt: list[int]) -> None:
        self.seen: list[int] = []
        self._prompt = prompt

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        assert len(text) < 10_000
        return super().encode(text, special=special)

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        if list(ids) == self._prompt:
            self.seen.append(self.service.batcher.admission.held_tokens)
        return super().text_and_spans(ids)


@contextmanager
def observed(prompt: list[int]) -> Iterator[tuple[Served, QueueObserver]]:
    """A service whose tokenizer is a QueueObserver."""
    tokenizer = QueueObserver(prompt)

    def load(_: Settings, __: Callable[[str], None], ___: OnDevice) -> LoadedPair:
        return LoadedPair(FakeEngine(), Encoder.of(tokenizer, "plain"), "observer")

    with served(load, max_length_tokens=128) as running:
        tokenizer.service = running.service
        yield running, tokenizer


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    with observed([]) as (running, _):
        status, code, message = refusal(running.score({"prompt": "a" * 2_000_000, "response": "b"}))
        assert (status, code) == (422, "too_long")
        assert "128 tokens (--max-length-tokens)" in message


def test_alternatives_are_counted_before_they_are_computed() -> None:
    engine = Recorder()
    with served(loading(engine), max_length_tokens=100_000) as running:
        body = {"prompt_ids": [1], "response_ids": [[2] * 50_001], "top_k": 20}
        status, code, message = refusal(running.score(body))
        assert (status, code) == (422, "too_long")
        assert "top_k 20 of 50001 scored tokens" in message
        assert "262144 alternatives" in message
        assert engine.batches == []


@pytest.mark.parametrize("kind", ["html", "svg", "ansi"])
def test_a_heatmap_has_at_most_as_many_tokens_as_the_setting_says(kind: str) -> None:
    with served(max_heatmap_tokens=140) as running:
        assert running.client.post("/heatmap", json=IDS | {"format": kind}).status_code == 200
        longer = IDS | {"response_ids": [[2] * 20, [3] * 21]}
        refused = running.client.post("/heatmap", json=longer | {"format": kind})
        status, code, message = refusal(refused)
        assert (status, code) == (422, "too_long")
        assert "a heatmap of 141 tokens, prompts repeated; the limit is 140 (--max-heatmap-tokens)" in message
        assert running.client.post("/heatmap", json=longer | {"format": "json"}).status_code == 200
        assert running.service.batcher.admission.held_tokens == 0


def test_a_picture_holds_its_place_in_the_queue_until_it_is_drawn() -> None:
    with observed([1] * 50) as (running, tokenizer):
        assert running.client.post("/heatmap", json=IDS).status_code == 200
        assert tokenizer.seen == [90, 90], "the prompt is decoded to be drawn, once for each response"
        wait_until(lambda: running.service.batcher.admission.held_tokens == 0)
