"""The pure parts of `score_many`: which service gets a prompt, and how many requests are in flight."""

import pytest
from dense_reward.client.http import Backoff
from dense_reward.client.many import InFlight
from dense_reward.client.routes import Routes

URLS = ("http://a", "http://b", "http://c")
ITEMS: list[dict[str, object]] = [{"prompt_ids": [i, i + 1], "response_ids": [[i]]} for i in range(90)]


def routes_to(*urls: str) -> Routes:
    return Routes(urls, Backoff(), 30.0)


def preferred_urls(routes: Routes, item: dict[str, object]) -> list[str]:
    return [routes.url(index) for index in routes.preferred(item)]


def test_without_a_service_only_its_own_prompts_move() -> None:
    full, fewer = routes_to(*URLS), routes_to("http://c", "http://a")
    for item in ITEMS:
        assert preferred_urls(fewer, item) == [url for url in preferred_urls(full, item) if url != "http://b"]


def test_every_service_gets_prompts() -> None:
    assert {preferred_urls(routes_to(*URLS), item)[0] for item in ITEMS} == set(URLS)


def test_the_responses_do_not_change_the_service() -> None:
    routes = routes_to(*URLS)
    for item in ITEMS:
        assert routes.preferred(item) == routes.preferred(item | {"response_ids": [[7, 8]]})


@pytest.mark.parametrize(
    ("took_s", "failures", "limit"),
    [(1.0, 0, 5), (5.0, 0, 4), (10.0, 0, 4), (11.0, 0, 3), (1.0, 1, 2), (11.0, 3, 2)],
)
def test_one_answer_changes_the_number_in_flight(took_s: float, failures: int, limit: int) -> None:
    in_flight = InFlight(most=16, slow_s=10.0)
    in_flight.learn(took_s, failures)
    assert in_flight.limit == limit


def test_the_number_in_flight_has_bounds() -> None:
    in_flight = InFlight(most=6, slow_s=10.0)
    for _ in range(9):
        in_flight.learn(1.0, 0)
    assert in_flight.limit == 6
    for _ in range(9):
        in_flight.learn(11.0, 0)
    assert in_flight.limit == 2
    for _ in range(9):
        in_flight.learn(1.0, 1)
    assert in_flight.limit == 1
    in_flight.learn(11.0, 0)
    assert in_flight.limit == 1
