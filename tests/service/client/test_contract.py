"""Client and service agree: every call of the client, against the real service with the fake engine."""

import threading
from collections.abc import Iterator
from dataclasses import fields

import httpx2
import numpy as np
import pytest
import uvicorn
from dense_reward import Client, ModelCard, ScoredResponse, ScoreOptions, ScoringError, ServedModel, Timing, Usage
from dense_reward.client.requests import Encoding
from dense_reward.http.app import create_app
from dense_reward.schemas import ArrayName
from dense_reward.serving.loaders import loader
from dense_reward.serving.service import Service
from dense_reward.settings import Settings

EVERYTHING: list[ArrayName] = [
    "token_ids",
    "tokens",
    "offsets",
    "text",
    "reward",
    "sft_logprob",
    "reference_logprob",
    "kl",
    "centred",
    "entropy",
    "varentropy",
    "return_to_go",
]
RESPONSES = [list(b"four"), [], list("ö".encode())]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(Service(Settings.model_validate({"engine": "fake"}), loader("fake"), lambda: None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(timeout=0.02)
        assert thread.is_alive(), "the service did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(params=["base64", "float"])
def client(url: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    encoding: Encoding = request.param
    with Client(url, timeout_s=30.0, encoding=encoding) as connected:
        connected.wait_until_ready(30.0)
        yield connected


def reward_of(result: ScoredResponse) -> list[float]:
    assert result.reward is not None
    return [float(value) for value in result.reward]


def test_the_pair_is_listed(client: Client) -> None:
    (card,) = client.models()
    assert isinstance(card, ModelCard)
    assert client.score_text("a").model.tokenizer_sha256 == card.tokenizer_sha256


def test_everything_that_can_be_asked_for_arrives_in_shape(client: Client) -> None:
    options = ScoreOptions(include=EVERYTHING, top_k=2, gamma=0.5)
    candidates = [np.full((len(ids), 3), 7) for ids in RESPONSES]
    scored = client.score_ids(
        list(b"2 + 2 ="), RESPONSES, candidate_ids=candidates, segments=[[(0, 2), (2, 4)], [], []], options=options
    )
    for result, ids in zip(scored.results, RESPONSES, strict=True):
        for name in EVERYTHING:
            array = getattr(result, name)
            assert name == "text" or len(array) == len(ids)
        assert result.candidate_reward is not None
        assert result.alternatives is not None
        assert [len(row) for row in result.alternatives] == [2] * len(ids)
        assert result.sum == pytest.approx(sum(reward_of(result)), abs=1e-5)
    assert [r.text for r in scored.results] == ["four", "", "ö"]
    assert scored.results[0].segments is not None
    assert scored.results[0].segments.sum() == pytest.approx(scored.results[0].sum, abs=1e-5)
    assert [r.candidate_reward.shape for r in scored.results if r.candidate_reward is not None] == [
        (4, 3),
        (0, 3),
        (2, 3),
    ]


def test_the_forms_of_one_input_have_equal_rewards(client: Client) -> None:
    prompt, response = b"2 + 2 =", b"four"
    ids = client.score_ids(list(prompt), [list(response)]).results[0]
    mask = [0] * len(prompt) + [1] * len(response)
    stream = client.score_stream(list(prompt + response), mask).results[0]
    (item,) = client.score_items([{"prompt_ids": list(prompt), "response_ids": [list(response)]}]).results
    assert reward_of(ids) == reward_of(stream) == reward_of(item)
    raw = ScoreOptions(render="raw", add_eos=False)
    text = client.score(prompt=prompt.decode(), response=response.decode(), options=raw).results[0]
    bos = client.score_ids([256, *prompt], [list(response)]).results[0]
    assert reward_of(text) == reward_of(bos)


def test_the_client_loses_no_key_of_an_answer(url: str, client: Client) -> None:
    answer = httpx2.post(f"{url}/score", json={"text": "a"}, trust_env=False).json()
    for key, record in (("model", ServedModel), ("usage", Usage), ("timing", Timing)):
        assert set(answer[key]) == {field.name for field in fields(record)}, key
    timing = client.score_text("a").timing
    assert timing.encode_s + timing.queue_s + timing.compute_s + timing.describe_s <= timing.total_s + 1e-9


def test_a_bad_item_stands_in_its_place(client: Client) -> None:
    items: list[dict[str, object]] = [{"text": "a"}, {"prompt_ids": [1], "response_ids": [[999_999]]}, {"text": "b"}]
    results = client.score_items(items, on_error="per_item").results
    assert [(r.item, r.error and r.error.code) for r in results] == [(0, None), (1, "unknown_token_id"), (2, None)]
    with pytest.raises(ScoringError) as raised:
        client.score_items(items)
    assert raised.value.code == "unknown_token_id"
    assert [item.item for item in raised.value.items] == [1]
    assert raised.value.request_id


def test_a_tokenizer_that_is_not_served_is_refused(client: Client) -> None:
    with pytest.raises(ScoringError, match="409 tokenizer_mismatch"):
        client.score_text("a", options=ScoreOptions(tokenizer_sha256="mine"))


def test_a_picture_is_drawn(client: Client) -> None:
    assert "</html>" in client.heatmap([{"prompt": "p", "responses": ["good", "bad"]}])
