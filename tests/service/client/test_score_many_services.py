"""`score_many` over several services, and over one that is lost for a while or serves other models: nothing is lost."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reward import AsyncClient, Backoff, Client, MismatchError
from faulty_service import CARD, FaultyService, made_up_reward
from served_pair import ServedPair, free_port, write_pair

QUICK = Backoff(first_s=0.005, longest_s=0.02)


def item(i: int) -> dict[str, object]:
    return {"prompt_ids": [1, i % 40], "response_ids": [[i % 900, 3]]}


def prompts_at(service: FaultyService) -> list[int]:
    """The prompt of each item that a service was sent, in order."""
    return [one["prompt_ids"][1] for body in service.bodies for one in json.loads(body)["items"]]


def test_asynchronous_items_have_the_same_results() -> None:
    async def scored() -> list[tuple[int, list[float]]]:
        async with AsyncClient(service.url, backoff=QUICK) as client:
            found = client.score_many((item(i) for i in range(300)), request_tokens=64)
            return [(one.index, r.reward.tolist()) async for one in found for r in one.results if r.reward is not None]

    with FaultyService() as service:
        assert asyncio.run(scored()) == [(i, made_up_reward([i, 3])) for i in range(300)]
        assert len(service.bodies) > 10, "one request would not keep a service busy"


def test_equal_prompts_go_to_one_service_and_each_service_gets_some() -> None:
    with FaultyService() as one, FaultyService() as other, Client(one.url, backoff=QUICK) as client:
        found = list(client.score_many(map(item, range(400)), urls=[one.url, other.url], request_tokens=64))
        shares = [prompts_at(service) for service in (one, other)]
    assert [result.index for result in found] == list(range(400))
    assert len(shares[0]) + len(shares[1]) == 400, "no item was sent twice"
    assert not set(shares[0]) & set(shares[1])
    assert min(len(set(share)) for share in shares) > 5


def test_the_share_of_a_service_that_is_down_moves_to_the_others() -> None:
    with FaultyService() as one, Client(one.url, retry_for_s=30, backoff=QUICK) as client:
        down = f"http://127.0.0.1:{free_port()}"
        found = list(client.score_many(map(item, range(400)), urls=[one.url, down], request_tokens=64))
        assert sorted(prompts_at(one)) == sorted(i % 40 for i in range(400))
    assert [result.index for result in found] == list(range(400))


def wait_for_senders(of_other_tests: set[threading.Thread]) -> None:
    """Wait until the requests that were on their way have ended. A client that is closed before leaves sockets open."""
    deadline = time.monotonic() + 60
    while any(thread.name.startswith("score_many") for thread in {*threading.enumerate()} - of_other_tests):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_models_in_the_middle_are_an_error_and_what_came_before_is_kept() -> None:
    other = CARD.model_copy(update={"revision": "r2"})
    kept: list[int] = []
    of_other_tests = {*threading.enumerate()}
    with FaultyService() as one, FaultyService(card=other) as two, Client(one.url, backoff=QUICK) as client:
        scored = client.score_many(map(item, range(400)), urls=[one.url, two.url], request_tokens=64)
        with pytest.raises(MismatchError, match=r"revision r[12] of made-up answered after revision r[12]"):
            kept.extend(result.index for result in scored)
        wait_for_senders(of_other_tests)
    assert kept == list(range(len(kept)))
    assert len(kept) < 400


def test_a_caller_that_stops_early_leaves_no_thread() -> None:
    of_other_tests = {*threading.enumerate()}
    with FaultyService() as service, Client(service.url, backoff=QUICK) as client:
        scored = client.score_many(map(item, range(5000)), request_tokens=64)
        assert [next(scored).index for _ in range(10)] == list(range(10))
        scored.close()
        wait_for_senders(of_other_tests)
        assert len(prompts_at(service)) < 5000


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[ServedPair]:
    write_pair(tmp_path)
    served = ServedPair(tmp_path, free_port())
    served.start()
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.kill()


@pytest.mark.slow
def test_a_service_that_is_killed_and_started_again_loses_and_doubles_nothing(
    pair: ServedPair, caplog: pytest.LogCaptureFixture
) -> None:
    items = [{"prompt_ids": [5, 6, 7 + i % 20], "response_ids": [[8, 9 + i % 50, 10]]} for i in range(600)]
    with Client(pair.url) as client:
        expected = [one.results[0].sum for one in client.score_many(items)]
        found = []
        with caplog.at_level(logging.INFO, "dense_reward.client"):
            for one in client.score_many(items, request_tokens=32, in_flight=2):
                found.append((one.index, one.results[0].sum))
                if one.index == 100:
                    pair.kill()
                    threading.Timer(3.0, pair.start).start()
    assert [index for index, _ in found] == list(range(600))
    assert [total for _, total in found] == pytest.approx(expected, abs=1e-5)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1, warned
    assert "retrying" in warned[0]
