"""The HTTP contract, tested on a real server with the fake engine: answers, and every refusal with status and code."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx2
import numpy as np
import pytest
from dense_reward.engines.fake import BOS_ID, EOS_ID, VOCABULARY, FakeTokenizer, state_logprobs
from dense_reward.errors import STATUS_BY_CODE
from running_service import TOKENIZER_SHA256, Served, served

RESPONSES = [[3, 4, 5], [], [6]]
IDS = {"prompt_ids": [1, 2], "response_ids": RESPONSES}
TEXT = {"prompt": "2+2=", "response": "4"}
Row = dict[str, object]


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """A service with small limits."""
    with served(max_body_bytes=1000, max_items=3, max_responses=2, max_length_tokens=20, name="narrow") as running:
        yield running


def rewards(prompt: list[int], response: list[int]) -> list[float]:
    ids = [*prompt, *response]
    return [
        float(state_logprobs("sft", ids[:t])[ids[t]] - state_logprobs("reference", ids[:t])[ids[t]])
        for t in range(len(prompt), len(ids))
    ]


def rows_of(answer: httpx2.Response) -> list[Row]:
    assert answer.status_code == 200, answer.text
    rows: list[Row] = answer.json()["results"]
    return rows


def assert_close(row: Row, name: str, expected: float | list[float]) -> None:
    np.testing.assert_allclose(np.array(row[name], dtype=np.float64), expected, atol=1e-5)


def test_exact_ids_get_the_rewards_of_those_very_ids(service: Served) -> None:
    rows = rows_of(service.score(IDS))
    assert [(row["item"], row["response"], row["length"]) for row in rows] == [(0, 0, 3), (0, 1, 0), (0, 2, 1)]
    for row, ids in zip(rows, RESPONSES, strict=True):
        assert set(row) == {"item", "response", "token_ids", "reward", "sum", "mean", "min", "length"}
        assert row["token_ids"] == ids
        assert_close(row, "reward", rewards([1, 2], ids))
        assert_close(row, "sum", sum(rewards([1, 2], ids)))
    assert (rows[1]["sum"], rows[1]["mean"], rows[1]["min"]) == (0.0, None, None)


PLAIN_PROMPT = [BOS_ID, *b"2+2=\n"]


@pytest.mark.parametrize(
    ("form", "prompt", "response"),
    [
        (TEXT, PLAIN_PROMPT, [*b"4", EOS_ID]),
        (TEXT | {"add_eos": False}, PLAIN_PROMPT, [*b"4"]),
        (TEXT | {"render": "raw"}, [BOS_ID, *b"2+2="], [*b"4", EOS_ID]),
        ({"text": "2+2=4"}, [BOS_ID], [*b"2+2=4"]),
        ({"token_ids": [9, 8, 7], "score_mask": [0, 1, 1]}, [9], [8, 7]),
        (
            {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
            PLAIN_PROMPT,
            [*b"4", EOS_ID],
        ),
    ],
    ids=str,
)
def test_each_form_of_an_item_is_scored(
    service: Served, form: dict[str, object], prompt: list[int], response: list[int]
) -> None:
    rows = rows_of(service.score(form))
    assert [row["token_ids"] for row in rows] == [response]
    assert_close(rows[0], "reward", rewards(prompt, response))


def test_a_batch_answers_each_item_as_alone(service: Served) -> None:
    items = [IDS, TEXT, {"token_ids": [1, 2, 3, 4], "score_mask": [0, 1, 0, 1]}]
    together = rows_of(service.score({"items": items}))
    alone = [row | {"item": i} for i, item in enumerate(items) for row in rows_of(service.score(item))]
    assert together == alone


def test_base64_carries_the_same_bits(service: Served) -> None:
    asked = IDS | {"include": ["token_ids", "reward", "return_to_go"], "gamma": 0.5}
    floats, packed = rows_of(service.score(asked)), rows_of(service.score(asked | {"encoding_format": "base64"}))
    for row, bits in zip(floats, packed, strict=True):
        for name, dtype in (("token_ids", "<i4"), ("reward", "<f4"), ("return_to_go", "<f4")):
            decoded = np.frombuffer(base64.b64decode(str(bits[name])), dtype=dtype)
            assert np.array_equal(decoded, np.array(row[name], dtype=dtype)), name


def test_an_answer_names_its_model_usage_and_timing(service: Served) -> None:
    answer = service.score(IDS).json()
    assert answer["model"] == {
        "name": "default",
        "sft": "fake-sft",
        "reference": "fake-reference",
        "token_head": None,
        "tokenizer_sha256": TOKENIZER_SHA256,
        "revision": "fake",
        "related": True,
    }
    assert answer["usage"] == {"prompt_tokens": 2, "response_tokens": 4, "scored_tokens": 4}
    assert set(answer["timing"]) == {"encode_s", "queue_s", "compute_s", "describe_s", "total_s"}
    assert all(seconds >= 0 for seconds in answer["timing"].values())


def test_what_is_expected_and_served_alike_is_answered(service: Served) -> None:
    expectations = {"model": "default", "tokenizer_sha256": TOKENIZER_SHA256, "expect_revision": "fake"}
    assert service.score(IDS | expectations).status_code == 200


def assert_refused(answer: httpx2.Response, status: int, code: str) -> dict[str, object]:
    """Checks the shape of an error, and that it has no stack trace. Returns its content."""
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert STATUS_BY_CODE[code] == status
    assert answer.json().keys() == {"error"}
    error: dict[str, object] = answer.json()["error"]
    assert error.keys() == {"code", "message", "param", "items", "request_id"}
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return error


@dataclass(frozen=True, slots=True)
class Bad:
    """A body that must be refused. `part` is a part of the message."""

    body: object
    code: str
    part: str
    param: str | None = None


BAD = {
    "empty prompt": Bad({"prompt_ids": [], "response_ids": [[1]]}, "empty_prompt", "at least one id", "prompt_ids"),
    "empty stream": Bad({"token_ids": [], "score_mask": []}, "empty_prompt", "at least one id", "token_ids"),
    "nothing before the first": Bad({"token_ids": [1], "score_mask": [1]}, "empty_prompt", "mask it out", "score_mask"),
    "too long": Bad(
        {"prompt_ids": [1] * 4000, "response_ids": [[1], [1] * 97]}, "too_long", "response 1 have 4097", "response"
    ),
    "unknown id": Bad({"prompt_ids": [1], "response_ids": [[1], [2, 258]]}, "unknown_token_id", "id 258 at position 1"),
    "negative id": Bad({"prompt_ids": [-1], "response_ids": [[1]]}, "unknown_token_id", "id -1", "prompt_ids"),
    "gigantic id": Bad({"prompt_ids": [10**300], "response_ids": [[1]]}, "unknown_token_id", "not in the vocabulary"),
    "unknown candidate": Bad(IDS | {"candidate_ids": [[[1], [1], [999]], [], [[1]]]}, "unknown_token_id", "id 999"),
    "text and ids": Bad({"text": "a", **IDS}, "invalid_request", "exactly one input"),
    "no input": Bad({}, "invalid_request", "this has none"),
    "half an input": Bad({"prompt_ids": [1]}, "invalid_request", "give prompt_ids and response_ids together"),
    "response and responses": Bad(TEXT | {"responses": ["5"]}, "invalid_request", "either response or responses"),
    "items and an input": Bad({"items": [TEXT], "text": "a"}, "invalid_request", "either items or one input"),
    "items in items": Bad({"items": [{"items": [TEXT]}]}, "invalid_request", "items.0.items", "items.0.items"),
    "no items": Bad({"items": []}, "invalid_request", "at least 1", "items"),
    "unknown key": Bad(IDS | {"temperature": 1}, "invalid_request", "there is no such key", "temperature"),
    "unknown key in an item": Bad({"items": [TEXT | {"colour": 1}]}, "invalid_request", "colour", "items.0.colour"),
    "float for an id": Bad({"prompt_ids": [1.0], "response_ids": [[1]]}, "invalid_request", "integer", "prompt_ids.0"),
    "gamma above 1": Bad(IDS | {"gamma": 1.5}, "invalid_request", "less than or equal to 1", "gamma"),
    "too many alternatives": Bad(IDS | {"top_k": 21}, "invalid_request", "less than or equal to 20", "top_k"),
    "unknown array": Bad(IDS | {"include": ["rewards"]}, "invalid_request", "include.0", "include.0"),
    "unknown signal": Bad(IDS | {"signal": "advantage"}, "invalid_request", "signal", "signal"),
    "mask of another length": Bad({"token_ids": [1, 2], "score_mask": [0]}, "invalid_request", "2 token_ids, but 1"),
    "add_eos with ids": Bad(IDS | {"add_eos": True}, "invalid_request", "append the id yourself", "add_eos"),
    "raw messages": Bad(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "render": "raw"},
        "invalid_request",
        "render raw is for text",
        "render",
    ),
    "no answer": Bad(
        {"messages": [{"role": "user", "content": "a"}]}, "invalid_request", "must end with the assistant"
    ),
    "no question": Bad({"messages": [{"role": "assistant", "content": "a"}]}, "empty_prompt", "nothing before"),
    "log-probs of no candidates": Bad(
        IDS | {"include": ["candidate_sft_logprob"]}, "invalid_request", "no item has candidate_ids"
    ),
    "candidates of another shape": Bad(IDS | {"candidate_ids": [[[1]], [], [[1]]]}, "wrong_shape", "[3][K]"),
    "segments outside": Bad(IDS | {"segments": [[[0, 4]], [], []]}, "wrong_shape", "[0, 4)", "segments"),
    "wrong tokenizer": Bad(IDS | {"tokenizer_sha256": "0" * 64}, "tokenizer_mismatch", "tokenizer fake"),
    "wrong revision": Bad(IDS | {"expect_revision": "old"}, "revision_mismatch", "revision fake is served"),
    "unknown model": Bad(IDS | {"model": "gpt"}, "model_not_found", "served: default", "model"),
    "not an object": Bad([IDS], "invalid_request", "object"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("route", ["/score", "/heatmap"])
def test_a_bad_request_is_refused_with_code_place_and_cure(service: Served, name: str, route: str) -> None:
    bad = BAD[name]
    error = assert_refused(service.client.post(route, json=bad.body), STATUS_BY_CODE[bad.code], bad.code)
    assert bad.part in str(error["message"])
    assert bad.param in {error["param"], None}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"text": "a"', "invalid_json"),
        (b"", "invalid_json"),
        (b"[" * 10_000, "invalid_json"),
        (b'{"text": "\xff"}', "invalid_unicode"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_unicode"),
        (b'{"text": "\\ud83d"}', "invalid_unicode"),
        (b'{"text": "\\ude00x"}', "invalid_unicode"),
        (b'{"prompt": "a", "response": "\\ud83d\\ud83d"}', "invalid_unicode"),
        (b'{"prompt_ids": [1], "response_ids": [[2]], "gamma": NaN}', "invalid_request"),
        (b'{"prompt_ids": [1], "response_ids": [[2]], "gamma": 1e999}', "invalid_request"),
        (b'{"prompt_ids": [NaN], "response_ids": [[2]]}', "invalid_request"),
    ],
)
def test_a_body_that_is_no_json_or_no_text_or_no_number_is_refused(service: Served, body: bytes, code: str) -> None:
    answer = service.client.post("/score", content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, STATUS_BY_CODE[code], code)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {},
        {"Content-Type": "application/json", "Content-Encoding": "br"},
    ],
)
def test_a_body_of_another_type_or_encoding_is_refused(service: Served, headers: Mapping[str, str]) -> None:
    answer = service.client.post("/score", content=json.dumps(IDS).encode(), headers=headers)
    assert_refused(answer, 415, "unsupported_media_type")


def test_a_content_type_with_a_charset_is_accepted(service: Served) -> None:
    headers = {"Content-Type": "application/JSON; charset=utf-8", "Content-Encoding": "identity"}
    assert service.client.post("/score", content=json.dumps(IDS), headers=headers).status_code == 200


def in_chunks(body: bytes, size: int = 100) -> Iterator[bytes]:
    yield from (body[at : at + size] for at in range(0, len(body), size))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("length", [1001, 300_000, 20_000_000])
def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(
    narrow: Served, length: int, declared: bool
) -> None:
    body = json.dumps({"text": "a" * length}).encode()[:length]
    headers = {"Content-Type": "application/json"}
    answer = narrow.client.post("/score", content=body if declared else in_chunks(body, 50_000), headers=headers)
    error = assert_refused(answer, 413, "body_too_large")
    assert "1000 bytes (--max-body-bytes)" in str(error["message"])


def test_a_chunked_body_within_the_limit_is_read_whole(narrow: Served) -> None:
    body = json.dumps(TEXT).ljust(1000).encode()
    answer = narrow.client.post("/score", content=in_chunks(body, 7), headers={"Content-Type": "application/json"})
    assert rows_of(answer) == rows_of(narrow.score(TEXT))


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"items": [TEXT] * 4}, "4 items; the limit is 3 (--max-items)"),
        ({"prompt_ids": [1], "response_ids": [[]] * 3}, "3 responses to one prompt; the limit is 2 (--max-responses)"),
        ({"prompt_ids": [1] * 10, "response_ids": [[1] * 11]}, "21 tokens; the limit is 20"),
    ],
)
def test_what_is_more_than_a_limit_allows_is_refused_with_the_limit(
    narrow: Served, body: Mapping[str, object], part: str
) -> None:
    assert part in str(assert_refused(narrow.score(body), 422, "too_long")["message"])
    assert narrow.score(TEXT).status_code == 200


def test_every_bad_item_is_reported_together(service: Served) -> None:
    items = [IDS, {"prompt_ids": [], "response_ids": [[1]]}, TEXT, {"prompt_ids": [1], "response_ids": [[999]]}]
    error = assert_refused(service.score({"items": items}), 422, "empty_prompt")
    assert isinstance(error["items"], list)
    assert [(fault["item"], fault["code"]) for fault in error["items"]] == [
        (1, "empty_prompt"),
        (3, "unknown_token_id"),
    ]


def test_per_item_answers_the_good_items_and_the_faults_of_the_bad_in_the_order_of_the_items(service: Served) -> None:
    bad = {"prompt_ids": [1], "response_ids": [[999]]}
    rows = service.score({"items": [TEXT, bad, IDS, bad], "on_error": "per_item"}).json()["results"]
    found = [(row["item"], row["error"]["code"] if "error" in row else row["response"]) for row in rows]
    assert found == [(0, 0), (1, "unknown_token_id"), (2, 0), (2, 1), (2, 2), (3, "unknown_token_id")]
    only_bad = service.score({"items": [bad], "on_error": "per_item"})
    assert [row["error"]["item"] for row in only_bad.json()["results"]] == [0]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/score", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("GET", "/web/nothing.js", 404, "not_found"),
        ("GET", "/web/../app.py", 404, "not_found"),
        ("GET", "/web/%2e%2e/app.py", 404, "not_found"),
    ],
)
def test_unknown_routes_and_methods_are_refused_in_the_same_shape(
    service: Served, method: str, path: str, status: int, code: str
) -> None:
    answer = service.client.request(method, path)
    assert_refused(answer, status, code)
    if status == 405 and path != "/":
        assert answer.headers["allow"]


@pytest.mark.parametrize("given", ["abc", "trace:1.2-3_4", "x" * 128])
def test_a_sane_request_id_is_kept(service: Served, given: str) -> None:
    answer = service.client.post("/score", json=IDS, headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == answer.json()["id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "<script>", "ä"])
def test_another_request_id_is_replaced(service: Served, given: str) -> None:
    answer = service.client.post("/score", json=IDS, headers={b"X-Request-Id": given.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json()["id"] == answer.headers["x-request-id"]


def test_the_served_pair_is_listed(narrow: Served) -> None:
    (card,) = narrow.client.get("/models").json()["models"]
    assert (card["name"], card["max_length_tokens"], card["vocabulary"]) == ("narrow", 20, VOCABULARY)
    assert card["quantities"] == sorted(["kl", "centred", "entropy", "varentropy", "candidate_reward", "alternatives"])
    assert card["end_of_turn_id"] == FakeTokenizer.eos_id


def test_health_and_readiness_are_reported(service: Served) -> None:
    assert service.client.get("/health").json() == {"state": "ready"}
    assert service.client.get("/ready").json()["state"] == "ready"
