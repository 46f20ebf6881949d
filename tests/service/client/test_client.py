"""The client against a real HTTP server that answers, refuses, stalls, drops connections and answers wrongly."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from dense_reward import (
    AlignmentError,
    AnswerError,
    Backoff,
    Client,
    MismatchError,
    Scored,
    ScoredResponse,
    ScoreOptions,
    ScoringError,
    ServiceUnavailableError,
)
from faulty_service import (
    CARD,
    FaultyService,
    Handler,
    Row,
    Trick,
    altered,
    drop_before_answer,
    drop_in_body,
    made_up_reward,
    refuse,
)

QUICK = Backoff(first_s=0.005, longest_s=0.02)
PROMPT, RESPONSES = [1, 2, 3], [[10, 11, 12], [], [13]]


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with FaultyService() as running:
        yield running


@pytest.fixture
def client(service: FaultyService) -> Iterator[Client]:
    with Client(service.url, timeout_s=30.0, retry_for_s=30.0, backoff=QUICK) as connected:
        yield connected


def rewards(scored: Scored) -> list[list[float] | None]:
    return [None if result.reward is None else result.reward.tolist() for result in scored.results]


def test_every_id_gets_its_reward(client: Client) -> None:
    scored = client.score_ids(PROMPT, RESPONSES)
    assert rewards(scored) == [made_up_reward(ids) for ids in RESPONSES]
    assert [result.sum for result in scored.results] == [sum(made_up_reward(ids)) for ids in RESPONSES]
    assert [(r.item, r.response, r.length) for r in scored.results] == [(0, 0, 3), (0, 1, 0), (0, 2, 1)]
    assert scored.results[1].mean is None
    assert scored.model.revision == CARD.revision
    assert (scored.timing.compute_s, scored.timing.describe_s) == (0.1, 0.05)


def test_arrays_are_sent_as_the_lists_that_they_hold(client: Client, service: FaultyService) -> None:
    client.score_ids(PROMPT, RESPONSES)
    client.score_ids(np.array(PROMPT), [np.array(ids, dtype=np.int32) for ids in RESPONSES])
    client.score_ids(list(np.array(PROMPT)), RESPONSES)
    assert len(set(service.bodies)) == 1


def test_a_matrix_of_responses_is_a_row_each(client: Client) -> None:
    assert rewards(client.score_ids(PROMPT, np.array([[4, 5], [6, 7]]))) == [
        made_up_reward([4, 5]),
        made_up_reward([6, 7]),
    ]


def test_the_two_encodings_give_equal_results(service: FaultyService) -> None:
    def ask(client: Client) -> list[ScoredResponse]:
        options = ScoreOptions(include=["reward", "kl", "candidate_sft_logprob"])
        candidates = [[[1, 2]] * 3, [], [[3, 4]]]
        segments = [[(0, 1), (1, 3)], [(0, 0)], []]
        return list(
            client.score_ids(PROMPT, RESPONSES, candidate_ids=candidates, segments=segments, options=options).results
        )

    with Client(service.url, encoding="float") as lists, Client(service.url, encoding="base64") as packed:
        for left, right in zip(ask(lists), ask(packed), strict=True):
            for name in ("token_ids", "reward", "kl", "candidate_reward", "candidate_sft_logprob", "segments"):
                as_list, as_base64 = getattr(left, name), getattr(right, name)
                assert as_list.dtype == as_base64.dtype
                assert as_list.shape == as_base64.shape
                np.testing.assert_array_equal(as_list, as_base64)
            assert left.sum == right.sum
    assert json.loads(service.bodies[0])["encoding_format"] == "float"


def test_candidates_and_segments_have_the_shapes_that_were_asked_for(client: Client) -> None:
    first, empty, last = client.score_ids(
        PROMPT,
        RESPONSES,
        candidate_ids=[[[1, 2]] * 3, [], [[3, 4]]],
        segments=[[(0, 1), (1, 3)], [], [(0, 1)]],
    ).results
    assert first.candidate_reward is not None
    assert first.candidate_reward.tolist() == [made_up_reward([1, 2])] * 3
    assert empty.candidate_reward is not None
    assert empty.candidate_reward.shape == (0, 0)
    assert first.segments is not None
    assert first.segments.tolist() == [made_up_reward([10])[0], sum(made_up_reward([11, 12]))]
    assert empty.segments is not None
    assert empty.segments.shape == (0,)
    assert last.kl is None


def test_a_stream_is_scored_where_its_mask_says(client: Client) -> None:
    (result,) = client.score_stream([1, 2, 3, 4, 5], np.array([0, 1, 0, 0, 1], dtype=bool)).results
    assert result.token_ids is not None
    assert result.token_ids.tolist() == [2, 5]


def test_texts_chats_and_batches_are_scored(client: Client) -> None:
    assert rewards(client.score(prompt="p", response="hi")) == [made_up_reward(b"hi")]
    assert rewards(client.score(prompt="p", responses=["a", "b"])) == [made_up_reward(b"a"), made_up_reward(b"b")]
    assert rewards(client.score_text("数")) == [made_up_reward("数".encode())]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi"}]
    assert rewards(client.score_messages(chat)) == [made_up_reward(b"hi")]
    items: list[Row] = [{"text": "a"}, {"prompt_ids": np.array([1]), "response_ids": [[7], [8]]}]
    batch = client.score_items(items)
    assert [(r.item, r.response) for r in batch.results] == [(0, 0), (1, 0), (1, 1)]


def test_a_bad_item_is_a_result_with_an_error(client: Client) -> None:
    items: list[Row] = [{"text": "a"}, {"prompt_ids": [], "response_ids": [[1], [2]]}, {"text": "b"}]
    scored = client.score_items(items, on_error="per_item")
    assert [(r.item, r.response, r.error and r.error.code) for r in scored.results] == [
        (0, 0, None),
        (1, None, "empty_prompt"),
        (2, 0, None),
    ]
    assert np.isnan(scored.results[1].sum)
    with pytest.raises(ValueError, match="item 1 failed"):
        client.to_torch(scored)


def test_a_failed_item_in_a_request_without_per_item_is_no_answer(client: Client) -> None:
    with pytest.raises(AnswerError, match="must all succeed"):
        client.score_items([{"prompt_ids": [], "response_ids": [[1]]}])


def test_responses_become_a_padded_tensor_and_a_mask(client: Client) -> None:
    padded, mask = client.to_torch(client.score_ids(PROMPT, RESPONSES))
    assert padded.dtype == torch.float32
    assert mask.tolist() == [[True, True, True], [False, False, False], [True, False, False]]
    assert padded.tolist() == [made_up_reward([10, 11, 12]), [0.0, 0.0, 0.0], [*made_up_reward([13]), 0.0, 0.0]]


def test_an_array_that_was_not_asked_for_cannot_be_padded(client: Client) -> None:
    with pytest.raises(ValueError, match="without kl"):
        client.to_torch(client.score_ids(PROMPT, RESPONSES), "kl")


def test_the_heatmap_is_text_in_its_own_encoding(client: Client) -> None:
    assert client.heatmap([{"text": "a"}], format="svg", palette="viridis") == "<svg>viridis é</svg>"


def test_models_are_listed_though_a_newer_service_says_more(client: Client) -> None:
    assert client.models() == (CARD,)


@pytest.mark.parametrize(
    "trick",
    [
        refuse(429, "queue_full", retry_after="0"),
        refuse(503, "starting"),
        refuse(503, "draining", retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
        refuse(502, "internal"),
        drop_before_answer,
        drop_in_body,
    ],
    ids=["busy", "starting", "a date", "bad gateway", "dropped", "dropped in the body"],
)
def test_what_may_pass_is_tried_again_with_the_same_bytes(service: FaultyService, trick: Trick) -> None:
    service.tricks.extend([trick, trick])
    with Client(service.url, timeout_s=30.0, retry_for_s=30.0, backoff=QUICK) as client:
        assert rewards(client.score_ids(PROMPT, RESPONSES)) == [made_up_reward(ids) for ids in RESPONSES]
    assert len(service.bodies) == 3
    assert len(set(service.bodies)) == 1


def test_an_answer_that_does_not_come_in_time_is_tried_again(service: FaultyService) -> None:
    hung_up = threading.Event()

    def stall(handler: Handler) -> None:
        handler.close_connection = True
        hung_up.wait(30.0)

    service.tricks.append(stall)
    with Client(service.url, timeout_s=0.2, retry_for_s=30.0, backoff=QUICK) as client:
        assert rewards(client.score_ids(PROMPT, RESPONSES)) == [made_up_reward(ids) for ids in RESPONSES]
    hung_up.set()
    assert len(service.bodies) > 1
    assert len(set(service.bodies)) == 1


def test_the_service_says_how_long_to_wait(client: Client, service: FaultyService) -> None:
    service.tricks.append(refuse(429, "queue_full", retry_after="0.1"))
    started = time.monotonic()
    client.score_text("a")
    assert time.monotonic() - started >= 0.1


def test_a_service_that_is_away_for_a_while_is_waited_for(client: Client, service: FaultyService) -> None:
    back_at = time.monotonic() + 0.2

    def away(handler: Handler) -> None:
        if time.monotonic() < back_at:
            handler.server.service.tricks.append(away)
        refuse(503, "starting")(handler)

    service.tricks.append(away)
    client.score_text("a")
    assert time.monotonic() >= back_at
    assert len(service.bodies) > 1


def test_patience_ends_with_what_happened_and_for_how_long(service: FaultyService) -> None:
    service.tricks.extend([refuse(429, "queue_full")] * 1000)
    with (
        Client(service.url, retry_for_s=0.1, backoff=QUICK) as client,
        pytest.raises(ServiceUnavailableError, match=r"attempts in \d+\.\d s; the last one: 429 queue_full") as raised,
    ):
        client.score_text("a")
    assert raised.value.attempts == len(service.bodies)
    assert raised.value.waited_s > 0
    assert isinstance(raised.value.__cause__, ScoringError)


def test_a_wait_longer_than_patience_is_not_begun(service: FaultyService) -> None:
    service.tricks.append(refuse(503, "draining", retry_after="3600"))
    with Client(service.url, retry_for_s=1800.0) as client, pytest.raises(ServiceUnavailableError):
        client.score_text("a")
    assert len(service.bodies) == 1


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def test_nobody_there_is_said_with_the_address() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with Client(url, retry_for_s=0.05, backoff=QUICK) as client:
        assert not client.ready()
        with pytest.raises(ServiceUnavailableError, match=f"{url}/score: ConnectError"):
            client.score_text("a")


def test_readiness_is_waited_for(client: Client, service: FaultyService) -> None:
    service.tricks.extend([refuse(503, "starting")] * 4)
    assert not client.ready()
    client.wait_until_ready(timeout_s=30.0)
    assert client.ready()
    loading = {"state": "starting", "progress": "loading the reference"}
    service.tricks.extend([lambda handler: handler.send_json(503, loading)] * 1000)
    with pytest.raises(ServiceUnavailableError, match="503 starting: loading the reference"):
        client.wait_until_ready(timeout_s=0.05)


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_a_refusal_rises_at_once_in_the_words_of_the_service(
    client: Client, service: FaultyService, status: int
) -> None:
    service.tricks.append(refuse(status, "too_long"))
    with pytest.raises(ScoringError, match="too_long: it is too_long") as raised:
        client.score_text("a")
    error = raised.value
    assert (error.status, error.code, error.param, error.request_id) == (status, "too_long", "prompt", "req-1")
    assert len(service.bodies) == 1


def test_a_proxys_own_500_is_tried_again_where_the_service_has_answered(service: FaultyService) -> None:
    def broken(handler: Handler) -> None:
        handler.send_bytes(500, b"Internal Server Error", {"content-type": "text/plain"})

    with Client(service.url, retry_for_s=30.0, backoff=QUICK) as client:
        service.tricks.append(broken)
        with pytest.raises(ScoringError, match="is not of this service"):
            client.score_text("a")
        client.score_text("a")
        service.tricks.append(broken)
        client.score_text("a")
    assert len(service.bodies) == 4


def test_every_bad_item_is_named(client: Client, service: FaultyService) -> None:
    items = [{"item": i, "code": "too_long", "message": "long", "param": "text"} for i in (0, 2)]
    error = {"code": "too_long", "message": "long", "param": "text", "items": items, "request_id": "r"}
    service.tricks.append(lambda handler: handler.send_json(422, {"error": error}))
    with pytest.raises(ScoringError, match="2 items are bad") as raised:
        client.score_text("a")
    assert [item.item for item in raised.value.items] == [0, 2]


def test_another_revision_is_a_mismatch(client: Client, service: FaultyService) -> None:
    service.tricks.append(refuse(409, "revision_mismatch"))
    with pytest.raises(MismatchError):
        client.score_text("a", options=ScoreOptions(expect_revision="other"))


def shorter(answer: Row, rows: list[Row]) -> None:
    rows[0]["reward"] = [1.0]


def of_other_ids(answer: Row, rows: list[Row]) -> None:
    rows[0]["token_ids"] = [10, 99, 12]


def shifted(answer: Row, rows: list[Row]) -> None:
    rows.reverse()


def one_lost(answer: Row, rows: list[Row]) -> None:
    del rows[1]


def of_another_length(answer: Row, rows: list[Row]) -> None:
    rows[0] |= {"length": 2, "reward": [1.0, 2.0], "token_ids": [10, 11]}


@pytest.mark.parametrize("change", [shorter, of_other_ids, shifted, one_lost, of_another_length])
def test_misaligned_rewards_are_not_handed_out(
    client: Client, service: FaultyService, change: Callable[[Row, list[Row]], None]
) -> None:
    service.tricks.append(altered(change))
    with pytest.raises(AlignmentError):
        client.score_ids(PROMPT, RESPONSES)
    assert len(service.bodies) == 1


def garbage(handler: Handler) -> None:
    handler.send_bytes(200, b"\x00<html>welcome to the router", {"content-type": "text/html"})


def test_garbage_is_no_answer(client: Client, service: FaultyService) -> None:
    service.tricks.extend([garbage, garbage])
    with pytest.raises(AnswerError, match="not an answer of a dense-reward service"):
        client.score_text("a")
    with pytest.raises(AnswerError, match="not a list of models"):
        client.models()


def test_another_service_at_the_address_is_recognised(service: FaultyService) -> None:
    with Client(service.url + "/elsewhere") as client:
        with pytest.raises(ScoringError, match="check base_url") as raised:
            client.score_text("a")
        assert raised.value.code == "http_404"
        service.tricks.append(lambda handler: handler.send_bytes(308, b"", {"location": "https://there/score"}))
        with pytest.raises(ScoringError, match="redirects to https://there/score: give that address"):
            client.score_text("a")


def test_the_key_is_sent_as_a_bearer(service: FaultyService) -> None:
    with Client(service.url, api_key="secret") as client:
        client.score_text("a")
        assert "secret" not in repr(vars(client))
    assert {name.lower(): value for name, value in service.headers[0].items()}["authorization"] == "Bearer secret"


def test_threads_may_share_a_client(client: Client) -> None:
    answers: list[list[list[float] | None]] = [[] for _ in range(8)]

    def ask(index: int) -> None:
        answers[index] = rewards(client.score_ids(PROMPT, [[index, index]]))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[made_up_reward([index, index])] for index in range(len(answers))]
