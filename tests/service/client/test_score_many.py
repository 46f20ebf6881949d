"""`score_many` against a real HTTP server."""

from collections.abc import Iterator

import pytest
from dense_reward import Backoff, Client, ScoringError
from faulty_service import FaultyService, made_up_reward

QUICK = Backoff(first_s=0.005, longest_s=0.02)


@pytest.fixture
def client() -> Iterator[Client]:
    with FaultyService() as service, Client(service.url, timeout_s=30.0, retry_for_s=30.0, backoff=QUICK) as connected:
        yield connected


def item(i: int) -> dict[str, object]:
    return {"prompt_ids": [1, i % 7], "response_ids": [[i % 900, 3]]}


def test_every_item_has_its_reward_once_and_in_order(client: Client) -> None:
    scored = list(client.score_many(item(i) for i in range(2000)))
    assert [one.index for one in scored] == list(range(2000))
    for i, one in enumerate(scored):
        assert [r.reward.tolist() for r in one.results if r.reward is not None] == [made_up_reward([i % 900, 3])]


def test_an_endless_source_is_read_ahead_only_so_far(client: Client) -> None:
    taken = 0

    def endless() -> Iterator[dict[str, object]]:
        nonlocal taken
        while True:
            taken += 1
            yield item(taken)

    scored = client.score_many(endless(), request_tokens=8, in_flight=2)
    for _ in range(50):
        next(scored)
    assert taken <= 50 + 64


@pytest.mark.parametrize("on_error", ["fail", "per_item"])
def test_a_bad_item_is_named_by_its_place(client: Client, on_error: str) -> None:
    items = [item(i) for i in range(40)]
    items[23] = {"prompt_ids": [1], "nonsense": 1}
    if on_error == "fail":
        with pytest.raises((ScoringError, ValueError, TypeError), match="item 23"):
            list(client.score_many(items, on_error="fail"))
        return
    scored = list(client.score_many(items, on_error="per_item"))
    assert [one.index for one in scored if one.error is not None] == [23]
    assert len(scored) == 40
