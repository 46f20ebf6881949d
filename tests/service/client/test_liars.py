"""A service, or something before it, that lies or holds its caller: the client finds out, or gives up in time."""

import asyncio
import gzip
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep

import pytest
from dense_reward import AsyncClient, Client, ClientError, Scored, ScoreOptions, ServiceUnavailableError, answers
from dense_reward.client.errors import AnswerError
from faulty_service import FaultyService, Handler, altered

OPTIONS = ScoreOptions(model="a-pair", expect_revision="a-revision", tokenizer_sha256="a-hash")
HELD_S = 60.0


def asked(service: FaultyService, timeout_s: float = 30.0) -> Scored:
    with Client(service.url, timeout_s=timeout_s, retry_for_s=0) as client:
        return client.score_ids([1], [[2]], options=OPTIONS)


async def asked_async(service: FaultyService, timeout_s: float = 30.0) -> Scored:
    async with AsyncClient(service.url, timeout_s=timeout_s, retry_for_s=0) as client:
        return await client.score_ids([1], [[2]], options=OPTIONS)


def of_model(**changed: object) -> Callable[[dict[str, object], list[dict[str, object]]], None]:
    """Changes the model that the answer claims to be of, which is otherwise the one that was requested."""

    def change(answer: dict[str, object], _: list[dict[str, object]]) -> None:
        model = answer["model"]
        assert isinstance(model, dict)
        model |= {"name": "a-pair", "revision": "a-revision", "tokenizer_sha256": "a-hash"} | changed

    return change


@pytest.mark.parametrize("name", ["name", "revision", "tokenizer_sha256"])
def test_an_answer_of_another_model_than_was_requested_is_refused(name: str) -> None:
    with FaultyService() as service:
        service.tricks.append(altered(of_model()))
        asked(service)
        service.tricks.append(altered(of_model(**{name: "another"})))
        with pytest.raises(AnswerError, match=f"{name} .* was requested, but the answer is of another"):
            asked(service)


def test_a_log_prob_above_zero_is_refused() -> None:
    def lie(answer: dict[str, object], rows: list[dict[str, object]]) -> None:
        of_model()(answer, rows)
        rows[0]["sft_logprob"] = [50.0]

    with FaultyService() as service:
        service.tricks.append(altered(lie))
        with pytest.raises(AnswerError, match="which no log-prob is"):
            asked(service)


def drip(handler: Handler) -> None:
    """A byte at a time, for longer than a caller waits; each comes before a limit on one read is reached."""
    handler.send_response(200)
    handler.send_header("content-length", "1000000")
    handler.end_headers()
    until_s = monotonic() + HELD_S
    with suppress(OSError):
        while monotonic() < until_s:
            handler.wfile.write(b" ")
            sleep(0.1)
    handler.close_connection = True


def drip_headers(handler: Handler) -> None:
    """The same with a header that does not end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-long: ")
    until_s = monotonic() + HELD_S
    with suppress(OSError):
        while monotonic() < until_s:
            handler.wfile.write(b"x")
            sleep(0.1)
    handler.close_connection = True


@pytest.mark.parametrize("drip", [drip, drip_headers])
def test_timeout_s_bounds_the_time_of_a_whole_answer(drip: Callable[[Handler], None]) -> None:
    with FaultyService() as service:
        begun_s = monotonic()
        service.tricks.append(drip)
        with pytest.raises(ServiceUnavailableError, match=r"not complete after 0\.5 s"):
            asked(service, timeout_s=0.5)
        service.tricks.append(drip)
        with pytest.raises(ServiceUnavailableError, match=r"not complete after 0\.5 s"):
            asyncio.run(asked_async(service, timeout_s=0.5))
        assert monotonic() - begun_s < HELD_S, "the client ended the answer, not the service"


def test_an_answer_that_inflates_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER_BYTES", 100_000)
    bomb = gzip.compress(b" " * 10_000_000)
    with FaultyService() as service:
        for ask in (asked, lambda service: asyncio.run(asked_async(service))):
            service.tricks.append(lambda handler: handler.send_bytes(200, bomb, {"content-encoding": "gzip"}))
            with pytest.raises(ClientError, match="larger than 100000 bytes"):
                ask(service)
