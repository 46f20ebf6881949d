"""Bytes of a body -> a request or its refusal; answers and errors -> bytes."""

import numpy as np
import orjson
import pytest
from dense_reward.errors import Fault, RequestError, refuse
from dense_reward.http.bodies import MAX_FAULTS, error_response, json_response, parse
from dense_reward.schemas import ScoreRequest


@pytest.mark.parametrize(("wait_s", "header"), [(0.2, "1"), (1.0, "1"), (1.2, "2"), (17.01, "18")])
def test_retry_after_is_rounded_up_to_whole_seconds(wait_s: float, header: str) -> None:
    response = error_response(refuse("queue_full", "full", retry_after_s=wait_s), "id")
    assert (response.status_code, response.headers["retry-after"]) == (429, header)


def test_an_error_without_a_time_names_none() -> None:
    assert "retry-after" not in error_response(refuse("not_found", "no"), "id").headers


def test_faults_of_items_are_listed_with_their_items() -> None:
    error = RequestError([Fault("too_long", "long", "response", 3), Fault("empty_prompt", "empty", None, 5)])
    content = orjson.loads(error_response(error, "id").body)["error"]
    assert (content["code"], content["param"], content["request_id"]) == ("too_long", "response", "id")
    assert [(row["item"], row["code"]) for row in content["items"]] == [(3, "too_long"), (5, "empty_prompt")]


def test_a_float32_is_written_with_the_digits_that_bring_it_back() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    text = json_response({"reward": values}).body
    assert np.array_equal(np.array(orjson.loads(text)["reward"], dtype=np.float32), values)
    assert len(text) < 1000 * 13


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt_ids":[1],"response_ids":[[' + b",".join([b"1.5"] * 200_000) + b"]]}",
        b'{"prompt_ids":[1],"response_ids":[' + b",".join([b"[true]"] * 200_000) + b"]}",
        b'{"token_ids":[1],"score_mask":[' + b",".join([b"2"] * 200_000) + b"]}",
        b'{"text":"a","candidate_ids":[' + b",".join([b'[["a"]]'] * 200_000) + b"]}",
        b'{"items":[' + b",".join([b"1"] * 200_000) + b"]}",
        b'{"items":[' + b",".join([b"{}"] * 60_000) + b"]}",
    ],
    ids=["ids", "responses", "mask", "candidates", "items", "empty items"],
)
def test_a_list_full_of_mistakes_is_refused_at_its_first_one(body: bytes) -> None:
    """Floats instead of ids are an honest mistake. 200,000 messages would delay all other requests."""
    with pytest.raises(RequestError) as refused:
        parse(body, ScoreRequest)
    assert len(refused.value.faults) <= 2


def refused(body: bytes) -> tuple[RequestError, bytes]:
    """The refusal of a body, and the bytes of its answer."""
    with pytest.raises(RequestError) as caught:
        parse(body, ScoreRequest)
    return caught.value, bytes(error_response(caught.value, "id").body)


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b'{"items":[{"text":"a"},', b"]}")])
def test_the_first_faults_are_listed_and_the_others_counted(before: bytes, after: bytes) -> None:
    keys = orjson.dumps({"text": "a"} | {f"key{i}": 0 for i in range(10_000)})
    error, answer = refused(before + keys + after)
    assert len(error.faults) == MAX_FAULTS + 1
    assert error.faults[-1].message == f"{10_000 - MAX_FAULTS} more faults are not listed: correct these first"
    assert {fault.item for fault in error.faults} == {1 if before else None}
    assert len(answer) < 10_000


def test_as_many_faults_as_can_be_listed_are_listed_without_a_count() -> None:
    error, _ = refused(orjson.dumps({"text": "a"} | {f"key{i}": 0 for i in range(MAX_FAULTS)}))
    assert [fault.param for fault in error.faults] == [f"key{i}" for i in range(MAX_FAULTS)]


def test_a_very_long_key_is_not_sent_back_whole() -> None:
    error, answer = refused(orjson.dumps({"text": "a", "k" * 1_000_000: 0}))
    assert error.faults[0].param == "k" * 100 + "… (1000000 characters)"
    assert len(answer) < 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"promt":"a","response":"b"}', "promt: there is no such key: did you mean prompt?"),
        (b'{"items":[{"prompt":"a","respons":"b"}]}', "items.0.respons: there is no such key: did you mean response?"),
        (b'{"prompt":"a","response":"b","zzz":1}', "zzz: there is no such key: remove it"),
        (b'{"messages":[{"role":"user","contents":"a"}]}', "messages.0.contents: there is no such key: remove it"),
        (
            b'{"prompt":[{"role":"user","content":"a"}],"response":"b"}',
            "prompt: must be a string; send a chat",
        ),
    ],
)
def test_a_slip_of_a_newcomer_is_refused_with_its_cure(body: bytes, message: str) -> None:
    assert refused(body)[0].faults[0].message.startswith(message)
