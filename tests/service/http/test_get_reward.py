"""POST /get_reward: OpenRLHF's request to the byte, one number for each response, and every refusal in words."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from dense_reward.engines.fake import BOS_ID, EOS_ID
from faulty_engines import Gate, Recorder
from running_service import PATIENCE_S, Served, loading, served, wait_until

PROMPT = "<bos>2+2="
# What aiohttp's client makes of OpenRLHF's payload.
BODY = b'{"query": ["<bos>2+2=4<eos>", "<bos>2+2=5"], "prompts": ["<bos>2+2=", "<bos>2+2="], "labels": ["4", null]}'
RESPONSES = [[*b"4", EOS_ID], [*b"5"]]


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


def ask(service: Served, body: bytes = BODY, options: str = "") -> httpx2.Response:
    return service.client.post(f"/get_reward{options}", content=body, headers={"Content-Type": "application/json"})


def texts(query: str, prompt: str = PROMPT) -> bytes:
    return json.dumps({"query": [query], "prompts": [prompt], "labels": [None]}).encode()


@pytest.mark.parametrize("aggregate", ["sum", "mean", "min"])
@pytest.mark.parametrize("signal", ["reward", "centred", "sft_logprob"])
def test_each_response_gets_the_aggregate_of_its_token_rewards(service: Served, aggregate: str, signal: str) -> None:
    answer = ask(service, options=f"?aggregate={aggregate}&signal={signal}")
    assert answer.status_code == 200, answer.text
    by_ids = {"prompt_ids": [BOS_ID, *b"2+2="], "response_ids": RESPONSES, "signal": signal, "include": []}
    rows = service.score(by_ids).json()["results"]
    assert "compute;dur=" in answer.headers["server-timing"]
    found = answer.json()
    assert found["rewards"] == found["scores"] == [row[aggregate] for row in rows]
    assert found["extra_logs"] == {
        f"dense_reward_{name}": [row[name] for row in rows] for name in ("length", "mean", "min", "sum")
    }


def test_the_sum_is_the_default(service: Served) -> None:
    assert ask(service).json() == ask(service, options="?aggregate=sum").json()


def test_an_empty_response_has_a_sum_but_no_mean(service: Served) -> None:
    answer = ask(service, texts(PROMPT)).json()
    assert answer["rewards"] == [0.0]
    assert answer["extra_logs"] == {"dense_reward_length": [0], "dense_reward_sum": [0.0]}
    refused = ask(service, texts(PROMPT), "?aggregate=min")
    assert refused.status_code == 422
    assert "an empty response has no min: aggregate by sum" in refused.text


@pytest.mark.parametrize(
    ("body", "options", "status", "reason"),
    [
        (texts("2+2=4"), "", 422, "query 0: the query does not start with its prompt"),
        (texts(PROMPT + "\ufffd"), "", 400, "U+FFFD"),
        (texts(PROMPT + "4<eos>\nand 3+3="), "", 422, "goes on after an end of turn"),
        (texts(PROMPT + "4<eos><eos>"), "", 422, "send ids with a score_mask to /score"),
        (texts("4", ""), "", 422, "prompt_ids is empty"),
        (b'{"query": ["a"], "prompts": ["a", "b"]}', "", 422, "one entry for each response"),
        (b'{"query": ["a"], "prompts": ["a"], "labels": []}', "", 422, "one entry for each response"),
        (b'{"query": [], "prompts": [], "labels": []}', "", 422, "at least 1 item"),
        (b'{"query": ["a"], "prompts": ["a"], "images": [1]}', "", 422, "images"),
        (b'{"query": "a", "prompts": "a"}', "", 422, "valid array"),
        (b'{"query": ["a"', "", 400, "invalid_json"),
        (BODY, "?aggregate=max", 422, "'sum', 'mean' or 'min'"),
        (BODY, "?agregate=sum", 422, "options of the URL: aggregate, model, signal"),
        (BODY, "?aggregate=sum&aggregate=mean", 422, "one option twice"),
        (BODY, "?model=other", 404, "model_not_found"),
        (BODY, "?tokenizer_sha256=0", 409, "tokenizer_mismatch"),
        (BODY, "?expect_revision=0", 409, "revision_mismatch"),
    ],
)
def test_what_cannot_be_known_to_be_right_is_refused(
    service: Served, body: bytes, options: str, status: int, reason: str
) -> None:
    answer = ask(service, body, options)
    assert answer.status_code == status, answer.text
    assert reason in answer.text


def test_a_query_that_is_too_long_is_not_truncated() -> None:
    with served(max_length_tokens=20) as narrow:
        for size in (30, 3000):
            answer = ask(narrow, texts(PROMPT + "4" * size))
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_long")


def test_too_many_queries_are_refused_before_they_are_tokenised() -> None:
    with served(max_items=1) as narrow:
        answer = ask(narrow, json.dumps({"query": ["4", "4"], "prompts": [PROMPT, PROMPT]}).encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_long")
    assert "2 queries; the limit is 1 (--max-items)" in answer.text


def test_a_busy_service_answers_503_with_the_time_of_a_retry() -> None:
    gate = Gate()
    with served(loading(Recorder(gate)), max_queue_tokens=90) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, {"prompt_ids": [1] * 50, "response_ids": [[2] * 40]})
        wait_until(gate.entered.is_set)
        refused = ask(running)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert ask(running).status_code == 200
        assert running.service.batcher.admission.held_tokens == 0


def test_the_key_of_a_service_goes_into_the_url(tmp_path: Path) -> None:
    key = "k" * 40
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "trainer", "key": key, "rights": ["score"]}]))
    with served(api_keys_file=file, ready=True) as guarded:
        assert ask(guarded).status_code == 401
        url = guarded.client.base_url.copy_with(username="openrlhf", password=key, path="/get_reward")
        headers = {"Content-Type": "application/json"}
        assert httpx2.post(url, content=BODY, headers=headers, trust_env=False).status_code == 200
