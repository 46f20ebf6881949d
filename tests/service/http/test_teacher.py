"""A teacher's routes on a real server with the fake engine: log-probs by definition, and what clients are refused."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from dense_reward.engines.fake import VOCABULARY, FakeEngine, FakeTokenizer, teacher_logprobs
from dense_reward.records import Teacher
from dense_reward.serving.loaders import LoadedPair
from dense_reward.serving.service import State
from dense_reward.text.encode import Encoder
from running_service import Served, served

TILTS = {"default": 0.0, "default:reference": -1.0, "default:tilted=1": 1.0, "default:tilted=-0.5": -0.5}
IDS = [7, 3, 250, 9]
Json = dict[str, Any]
COMPLETION: Json = {"prompt": IDS, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 3}
GENERATE: Json = {
    "token_ids": IDS,
    "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 3},
}
SGLANG: Json = {
    "input_ids": IDS,
    "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
    "return_logprob": True,
    "logprob_start_len": 0,
}
ROUTES: dict[str, Json] = {"/v1/completions": COMPLETION, "/inference/v1/generate": GENERATE, "/generate": SGLANG}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    with served(max_items=2, max_length_tokens=4) as running:
        yield running


def answer_of(response: httpx2.Response) -> Json:
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def meta_of(response: httpx2.Response) -> Json:
    meta: Json = answer_of(response)["meta_info"]
    return meta


def message_of(response: httpx2.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def assert_entries(entries: list[dict[str, Any] | None], ids: list[int], teacher: Teacher, k: int) -> None:
    """vLLM's prompt_logprobs: the token itself first, then the k likeliest ids, all with their log-probs and ranks."""
    assert entries[0] is None
    assert len(entries) == len(ids)
    for position, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        logprob_V = teacher_logprobs(teacher, ids[:position])
        order = np.argsort(-logprob_V).tolist()
        assert next(iter(entry)) == str(ids[position])
        assert set(map(int, entry)) == {ids[position], *order[:k]}
        for token, found in entry.items():
            assert found["logprob"] == pytest.approx(logprob_V[int(token)], abs=1e-5)
            assert found["rank"] == 1 + order.index(int(token))


@pytest.mark.parametrize(("name", "tilt"), TILTS.items())
@pytest.mark.parametrize("k", [0, 1, 3, 1024])
def test_completions_have_the_log_probs_of_each_teacher(service: Served, name: str, tilt: float, k: int) -> None:
    asked = COMPLETION | {"model": name, "prompt": [IDS, [5], [8, 8]], "prompt_logprobs": k, "temperature": 0.7}
    answer = answer_of(service.client.post("/v1/completions", json=asked))
    assert (answer["model"], answer["object"]) == (name, "text_completion")
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, ids in zip(answer["choices"], asked["prompt"], strict=True):
        assert_entries(choice["prompt_logprobs"], ids, Teacher(tilt, 0.7), min(k, VOCABULARY))
        likeliest = int(teacher_logprobs(Teacher(tilt), ids).argmax())
        assert choice["token_ids"] == [likeliest]
        assert choice["text"] == "".join(FakeTokenizer().pieces([likeliest]))
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("k", [0, 1, 5])
def test_an_echo_has_the_same_log_probs_in_openai_s_arrays(service: Served, k: int) -> None:
    prompts = [IDS, [5]]
    asked = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "seed": 1, "echo": True, "logprobs": k}
    answer = answer_of(service.client.post("/v1/completions", json=asked))
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert choice["prompt_logprobs"] is None
        assert found["tokens"] == [f"token_id:{token}" for token in [*ids, *choice["token_ids"]]]
        assert found["token_logprobs"][0] is found["token_logprobs"][-1] is None
        assert found["top_logprobs"][0] is found["top_logprobs"][-1] is None
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        for position in range(1, len(ids)):
            logprob_V = teacher_logprobs(Teacher(0.0), ids[:position])
            own, top = found["token_logprobs"][position], found["top_logprobs"][position]
            assert own == pytest.approx(logprob_V[ids[position]], abs=1e-5)
            likeliest = [f"token_id:{token}" for token in np.argsort(-logprob_V)[:k]]
            assert set(top) == {f"token_id:{ids[position]}", *likeliest}
            assert top[f"token_id:{ids[position]}"] == own, "equal to the bit: lm_eval compares them"


def test_one_prompt_is_one_choice_and_no_token_is_written_unless_asked_for(service: Served) -> None:
    answer = answer_of(service.client.post("/v1/completions", json=COMPLETION | {"max_tokens": 0}))
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"], answer["usage"]["completion_tokens"]) == ("", [], 0)
    assert_entries(choice["prompt_logprobs"], IDS, Teacher(0.0), 3)


@pytest.mark.parametrize(("name", "tilt"), TILTS.items())
def test_the_route_for_ids_has_the_same(service: Served, name: str, tilt: float) -> None:
    answer = answer_of(
        service.client.post("/inference/v1/generate", json=GENERATE | {"model": name, "request_id": "a"})
    )
    assert_entries(answer["prompt_logprobs"], IDS, Teacher(tilt), 3)
    likeliest = int(teacher_logprobs(Teacher(tilt), IDS).argmax())
    assert answer["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", "token_ids": [likeliest]}]
    assert (answer["request_id"], answer["model"]) == ("a", name)


@pytest.mark.parametrize(("name", "tilt"), TILTS.items())
def test_sglangs_route_has_the_same_below_the_name_of_a_teacher(service: Served, name: str, tilt: float) -> None:
    asked = SGLANG | {"top_logprobs_num": 2, "token_ids_logprob": [4, 5, 4]}
    meta = meta_of(service.client.post(f"/teacher/{name}/generate", json=asked))
    assert meta["input_token_logprobs"][0] == [None, IDS[0], None]
    assert meta["input_top_logprobs"][0] is meta["input_token_ids_logprobs"][0] is None
    for position in range(1, len(IDS)):
        logprob_V = teacher_logprobs(Teacher(tilt), IDS[:position])
        wanted = {
            "input_token_logprobs": [IDS[position]],
            "input_top_logprobs": np.argsort(-logprob_V)[:2].tolist(),
            "input_token_ids_logprobs": [4, 5, 4],
        }
        for field, ids in wanted.items():
            row = meta[field][position]
            listed = [row] if field == "input_token_logprobs" else row
            assert [token for _, token, _ in listed] == ids
            assert [value for value, _, _ in listed] == pytest.approx(logprob_V[ids].tolist(), abs=1e-5)


def test_sglangs_route_starts_where_it_is_told_and_takes_several(service: Served) -> None:
    several = service.client.post("/generate", json=SGLANG | {"input_ids": [IDS, IDS[1:]], "logprob_start_len": 2})
    whole = meta_of(service.client.post("/generate", json=SGLANG))["input_token_logprobs"]
    first, second = (answer["meta_info"]["input_token_logprobs"] for answer in json.loads(several.text))
    assert first == [[None, IDS[2], None], whole[3]]
    assert second == [[None, IDS[3], None]]


def test_ids_of_each_position_have_their_own_log_probs(service: Served) -> None:
    positions = [[1], [4, 5], [], [6]]
    meta = answer_of(service.client.post("/generate", json=SGLANG | {"token_ids_logprob_positions": positions}))[
        "meta_info"
    ]
    rows = meta["input_token_ids_logprobs"]
    assert rows[0] is None
    for position, ids in enumerate(positions[1:], start=1):
        logprob_V = teacher_logprobs(Teacher(0.0), IDS[:position])
        assert [token for _, token, _ in rows[position]] == ids
        assert [value for value, _, _ in rows[position]] == pytest.approx(logprob_V[ids].tolist(), abs=1e-5)
    empty = SGLANG | {"token_ids_logprob_positions": [[], [], [], []]}
    assert answer_of(service.client.post("/generate", json=empty))["meta_info"]["input_token_ids_logprobs"] == [
        None,
        [],
        [],
        [],
    ]


@pytest.mark.parametrize("route", ROUTES)
def test_temperature_0_is_greedy_and_leaves_log_probs_as_at_1(service: Served, route: str) -> None:
    def at(temperature: float) -> str:
        body: Json = json.loads(json.dumps(ROUTES[route]))
        body.get("sampling_params", body)["temperature"] = temperature
        text = json.dumps(answer_of(service.client.post(route, json=body)))
        return text[text.index('_logprobs": [') :]  # what comes before differs with each request

    assert at(0) == at(1) != at(0.5)


def test_the_list_of_teachers_has_each_pair_as_sft_and_reference_and_a_name_has_itself(service: Served) -> None:
    def ids(path: str) -> list[str]:
        return [entry["id"] for entry in answer_of(service.client.get(path))["data"]]

    assert ids("/v1/models") == ["default@fake", "default", "default@fake:reference", "default:reference"]
    card = service.client.get("/models").json()["models"][0]
    roots = [one["root"] for one in service.client.get("/v1/models").json()["data"]]
    assert roots == [card["sft"], card["sft"], card["reference"], card["reference"]]
    assert ids("/teacher/default:tilted=0.25/v1/models") == ["default@fake:tilted=0.25", "default:tilted=0.25"]
    assert ids("/teacher/default%3Atilted%3D0.25/v1/models") == ["default@fake:tilted=0.25", "default:tilted=0.25"]
    assert ids("/teacher/default@fake/v1/models") == ["default@fake"]
    assert service.client.get("/teacher/default:tilted=0.25/health").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_a_name_with_another_revision_is_not_found(service: Served, route: str) -> None:
    served = answer_of(service.client.post(f"/teacher/default@fake:tilted=1{route}", json=ROUTES[route]))
    plain = answer_of(service.client.post(f"/teacher/default:tilted=1{route}", json=ROUTES[route]))
    assert served.keys() == plain.keys()
    gone = "/teacher/default@0123456789abcdef:tilted=1"
    assert "revision fake, not 0123456789abcdef" in message_of(
        service.client.post(gone + route, json=ROUTES[route]), 404
    )
    assert "was replaced" in message_of(service.client.get(gone + "/v1/models"), 404)


def test_a_name_in_the_url_and_another_in_the_body_are_refused(service: Served) -> None:
    path = "/teacher/default:reference/v1/completions"
    same = answer_of(service.client.post(path, json=COMPLETION | {"model": "default:reference"}))
    assert same["choices"] == answer_of(service.client.post(path, json=COMPLETION))["choices"]
    refused = service.client.post(path, json=COMPLETION | {"model": "default"})
    assert "is for the teacher 'default:reference'" in message_of(refused, 404)


UNKNOWN = [
    "other",
    "other:reference",
    "default:tilted=",
    "default:tilted=nan",
    "default:tilted=-1.5",
    "default:tilted=1_0",
]


@pytest.mark.parametrize("name", [*UNKNOWN, "default:tilted=1e9", "default:sft"])
def test_an_unknown_teacher_is_not_found(service: Served, name: str) -> None:
    assert message_of(service.client.post("/v1/completions", json=COMPLETION | {"model": name}), 404)
    assert message_of(service.client.get(f"/teacher/{name}/v1/models"), 404)


REFUSED: dict[str, tuple[str, Json, str]] = {
    "text": ("/v1/completions", {"prompt": "2+2="}, "ids, not text"),
    "texts": ("/v1/completions", {"prompt": ["2+2="]}, "ids, not text"),
    "no ids": ("/v1/completions", {"prompt": []}, "give at least one"),
    "no ids in a sequence": ("/v1/completions", {"prompt": [[1], []]}, r"prompt\[1\] has no ids"),
    "an unknown id": ("/v1/completions", {"prompt": [[1], [2, 258]]}, r"prompt\[1\]: id 258 at position 1"),
    "a negative id": ("/v1/completions", {"prompt": [-1]}, "not in the vocabulary"),
    "a fraction": ("/v1/completions", {"prompt": [[1, 2.5]]}, "a list of integers"),
    "a truth value": ("/v1/completions", {"prompt": [1, True]}, "a list of integers"),
    "a whole fraction": ("/v1/completions", {"prompt": [1.0]}, "a list of integers"),
    "lists in lists": ("/v1/completions", {"prompt": [[[1]]]}, "a list of integers"),
    "an id and a list": ("/v1/completions", {"prompt": [1, [2]]}, "a list of integers"),
    "far too many lists": ("/v1/completions", {"prompt": [[1]] * 65_537}, "more than 65536 lists and objects"),
    "more tokens": ("/v1/completions", {"max_tokens": 16}, "only 0 or 1 here: it answers with log-probs"),
    "all ids": ("/v1/completions", {"prompt_logprobs": -1}, "greater than or equal to 0"),
    "too many ids": ("/v1/completions", {"prompt_logprobs": 1025}, "1024"),
    "no log-probs": ("/v1/completions", {"prompt_logprobs": None}, "prompt_logprobs"),
    "a nucleus": ("/v1/completions", {"top_p": 0.9}, "of the whole distribution"),
    "the top": ("/v1/completions", {"top_k": 5}, "of the whole distribution"),
    "a bias": ("/v1/completions", {"logit_bias": {"3": 1.0}}, "of the whole distribution"),
    "a stream": ("/v1/completions", {"stream": True}, "sent whole"),
    "an echo beside prompt_logprobs": ("/v1/completions", {"echo": True, "logprobs": 1}, "or echo true with logprobs"),
    "log-probs of the generated token": ("/v1/completions", {"logprobs": 0}, "or echo true with logprobs"),
    "an echo without log-probs": (
        "/v1/completions",
        {"echo": True, "prompt_logprobs": None},
        "give prompt_logprobs, or echo true with logprobs",
    ),
    "two answers": ("/v1/completions", {"n": 2}, "at most one token"),
    "an unknown option": ("/v1/completions", {"adapter": "x"}, "adapter"),
    "a temperature below": ("/v1/completions", {"temperature": -1}, "greater than or equal to 0"),
    "a tiny temperature": ("/v1/completions", {"temperature": 1e-6}, "at least 0.01"),
    "infinite temperature": ("/v1/completions", {"temperature": 1e400}, "temperature"),
    "no token": ("/inference/v1/generate", {"token_ids": []}, "give at least one"),
    "an image": ("/inference/v1/generate", {"features": {}}, "only null here: leave it out"),
    "text from SGLang": ("/generate", {"text": "2+2="}, "send input_ids"),
    "no log-probs of SGLang": ("/generate", {"return_logprob": False}, "return_logprob"),
    "writing": ("/generate", {"sampling_params": {"max_new_tokens": 8}}, "only 0 here"),
    "a start behind the end": ("/generate", {"logprob_start_len": 4}, "not below 4"),
    "no start": ("/generate", {"logprob_start_len": -1}, "greater than or equal to 0"),
    "an unknown requested id": ("/generate", {"token_ids_logprob": [258]}, "not in the vocabulary"),
    "lists for other positions": ("/generate", {"token_ids_logprob_positions": [[1], [2]]}, "a list for each of its 4"),
    "two kinds of lists": (
        "/generate",
        {"token_ids_logprob": [1], "token_ids_logprob_positions": [[]] * 4},
        "not both",
    ),
    "too wide a list": ("/generate", {"token_ids_logprob_positions": [[], [1] * 1025, [], []]}, "the limit is 1024"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_teacher_does_not_do_is_a_bad_request_in_words(service: Served, case: str) -> None:
    route, change, words = REFUSED[case]
    body = json.dumps(ROUTES[route] | change)
    response = service.client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert re.search(words, message_of(response, 400)), response.text


def test_limits_are_those_of_the_service(narrow: Served) -> None:
    too_many = narrow.client.post("/v1/completions", json=COMPLETION | {"prompt": [[1], [2], [3]]})
    assert "the limit is 2 (--max-items)" in message_of(too_many, 400)
    too_long = narrow.client.post("/v1/completions", json=COMPLETION | {"prompt": [[1], [1] * 5]})
    assert "prompt[1] has 5 tokens; the limit is 4" in message_of(too_long, 400)
    longest = answer_of(narrow.client.post("/v1/completions", json=COMPLETION | {"prompt": [1] * 4}))
    assert len(longest["choices"][0]["prompt_logprobs"]) == 4


def test_an_answer_with_too_many_log_probs_is_refused(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_reward.teacher.questions.MAX_ENTRIES", 11)
    assert "the answer would have 12 log-probs; the limit is 11" in message_of(
        service.client.post("/v1/completions", json=COMPLETION), 400
    )
    answer_of(service.client.post("/v1/completions", json=COMPLETION | {"prompt_logprobs": 2}))


@pytest.mark.parametrize("route", [*ROUTES, *(f"/teacher/default{route}" for route in ROUTES)])
def test_a_full_queue_is_503_with_retry_after_and_never_429(route: str) -> None:
    body = ROUTES[route.removeprefix("/teacher/default")]
    with served() as running:
        admission = running.service.batcher.admission
        admission.held_tokens = admission.capacity_tokens
        refused = running.client.post(route, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert running.score({"prompt_ids": [1], "response_ids": [[2]]}).status_code == 429
        admission.held_tokens = 0
        assert running.client.post(route, json=body).status_code == 200


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_service_that_is_not_ready_is_503_with_retry_after(state: State) -> None:
    with served() as running:
        running.service.state = state
        paths = ["/v1/models", "/teacher/default/v1/models", "/teacher/default/health"]
        answers = [running.client.get(path) for path in paths]
        answers += [running.client.post(route, json=body) for route, body in ROUTES.items()]
        running.service.state = "ready"
    for answer in answers:
        assert (answer.status_code, int(answer.headers["retry-after"])) == (503, 2), answer.request.url


def test_the_limits_of_a_key_are_503_on_routes_with_a_contract_of_others(tmp_path: Path) -> None:
    entry = {"name": "trainer", "key": "k" * 16, "requests_per_minute": 1}
    (tmp_path / "keys.json").write_text(json.dumps([entry]))
    with served(api_keys_file=tmp_path / "keys.json") as running:
        assert running.client.get("/v1/models").status_code == 401
        assert running.client.get("/teacher/default/health").status_code == 200
        headers = {"Authorization": "Bearer " + "k" * 16}
        assert running.client.get("/v1/models", headers=headers).status_code == 200
        refused = running.client.post("/v1/completions", json=COMPLETION, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "rate_limited")
        assert int(refused.headers["retry-after"]) >= 1
        assert running.client.post("/get_reward", json={}, headers=headers).status_code == 503
        assert running.client.post("/score", json={}, headers=headers).status_code == 429


def test_an_engine_without_whole_distributions_says_who_can_be_a_teacher() -> None:
    def load(*_: object) -> LoadedPair:
        return LoadedPair(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")

    with served(load) as running:
        for route, body in ROUTES.items():
            assert "serve the pair with --engine torch" in message_of(running.client.post(route, json=body), 400)
        assert "--engine torch" in message_of(running.client.get("/v1/models"), 400)
        assert "--engine torch" in message_of(running.client.get("/teacher/default/v1/models"), 400)


def test_requests_with_rewards_and_other_teachers_in_one_batch_keep_their_answers(service: Served) -> None:
    """The scheduler puts what waits into one batch: each engine of it computes its own part."""
    names = [*TILTS, "default:tilted=3"]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(service.client.post, "/v1/completions", json=COMPLETION | {"model": n}) for n in names * 3]
        scored = [pool.submit(service.score, {"prompt_ids": IDS[:1], "response_ids": [IDS[1:]]}) for _ in range(4)]
    for name, future in zip(names * 3, asked, strict=True):
        tilt = TILTS.get(name, 3.0)
        assert_entries(answer_of(future.result())["choices"][0]["prompt_logprobs"], IDS, Teacher(tilt), 3)
    assert len({json.dumps(answer_of(future.result())["results"]) for future in scored}) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_reports_where_its_time_went(service: Served, route: str) -> None:
    stages = service.client.post(route, json=ROUTES[route]).headers["server-timing"]
    assert re.fullmatch(r"queue;dur=[\d.]+, compute;dur=[\d.]+, write;dur=[\d.]+", stages)


def test_metrics_and_the_log_name_the_routes(service: Served) -> None:
    service.client.post("/teacher/default:tilted=7/v1/completions", json=COMPLETION)
    text = service.client.get("/metrics").text
    assert 'route="/teacher/{teacher}/v1/completions",status="200"' in text
    assert "tilted=7" not in text
