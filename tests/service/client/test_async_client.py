"""The asynchronous client behaves like the synchronous one, and waits for many answers concurrently."""

import asyncio
import gc
import inspect
from collections.abc import Awaitable, Callable, Iterator

import pytest
from dense_reward import AsyncClient, Backoff, Client, Scored, ScoreOptions, ScoringError, ServiceUnavailableError
from faulty_service import CARD, FaultyService, drop_in_body, made_up_reward, refuse

QUICK = Backoff(first_s=0.005, longest_s=0.02)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with FaultyService() as running:
        yield running


def public(of: type) -> dict[str, list[tuple[str, object]]]:
    """The arguments and defaults of every public method."""
    methods = {name: getattr(of, name) for name in dir(of) if not name.startswith("_")}
    parameters = {name: inspect.signature(method).parameters.values() for name, method in methods.items()}
    return {name: [(parameter.name, parameter.default) for parameter in of_one] for name, of_one in parameters.items()}


def test_the_twins_have_the_same_methods_and_arguments() -> None:
    assert public(Client) == public(AsyncClient)
    sync, asynchronous = inspect.signature(Client).parameters, inspect.signature(AsyncClient).parameters
    assert {name: p.default for name, p in sync.items()} == {name: p.default for name, p in asynchronous.items()}


def everything(client: Client) -> list[Scored]:
    return [
        client.score(prompt="p", responses=["a", "b"]),
        client.score_ids([1], [[2, 3], []], candidate_ids=[[[1], [2]], []], segments=[[(0, 1)], []]),
        client.score_stream([1, 2, 3], [0, 1, 1]),
        client.score_messages(CHAT, options=ScoreOptions(include=["reward", "kl"])),
        client.score_text("a"),
        client.score_items([{"text": "a"}, {"prompt_ids": [], "response_ids": [[1]]}], on_error="per_item"),
    ]


async def everything_async(url: str) -> list[Scored]:
    async with AsyncClient(url) as client:
        assert await client.ready()
        await client.wait_until_ready(1.0)
        assert await client.models() == (CARD,)
        assert await client.heatmap([{"text": "a"}], palette="viridis") == "<svg>viridis é</svg>"
        return [
            await client.score(prompt="p", responses=["a", "b"]),
            await client.score_ids([1], [[2, 3], []], candidate_ids=[[[1], [2]], []], segments=[[(0, 1)], []]),
            await client.score_stream([1, 2, 3], [0, 1, 1]),
            await client.score_messages(CHAT, options=ScoreOptions(include=["reward", "kl"])),
            await client.score_text("a"),
            await client.score_items([{"text": "a"}, {"prompt_ids": [], "response_ids": [[1]]}], on_error="per_item"),
        ]


def test_the_twins_send_the_same_bytes_and_give_the_same_results(service: FaultyService) -> None:
    with Client(service.url) as client:
        sync = everything(client)
    sent, service.bodies[:] = list(service.bodies), []
    asynchronous = asyncio.run(everything_async(service.url))
    assert service.bodies[-len(sent) :] == sent
    assert [repr(scored) for scored in asynchronous] == [repr(scored) for scored in sync]


def asked(url: str, ask: Callable[[AsyncClient], Awaitable[Scored]], retry_for_s: float = 30.0) -> Scored:
    async def run() -> Scored:
        async with AsyncClient(url, timeout_s=30.0, retry_for_s=retry_for_s, backoff=QUICK) as client:
            return await ask(client)

    return asyncio.run(run())


def test_what_may_pass_is_tried_again(service: FaultyService) -> None:
    service.tricks.extend([refuse(429, "queue_full", retry_after="0"), refuse(503, "starting"), drop_in_body])
    assert asked(service.url, lambda client: client.score_text("a")).results[0].sum == sum(made_up_reward(b"a"))
    assert len(service.bodies) == 4


def test_patience_ends(service: FaultyService) -> None:
    service.tricks.extend([refuse(503, "starting")] * 1000)
    with pytest.raises(ServiceUnavailableError, match="503 starting"):
        asked(service.url, lambda client: client.score_text("a"), retry_for_s=0.1)


def test_a_refusal_rises_at_once(service: FaultyService) -> None:
    service.tricks.append(refuse(422, "too_long"))
    with pytest.raises(ScoringError, match="too_long"):
        asked(service.url, lambda client: client.score_text("a"))
    assert len(service.bodies) == 1


def test_many_calls_wait_together_even_for_a_free_connection(service: FaultyService) -> None:
    async def run() -> list[Scored]:
        async with AsyncClient(service.url, timeout_s=30.0, retry_for_s=0.0) as client:
            return await asyncio.gather(*(client.score_ids([1], [[i, i]]) for i in range(150)))

    scored = asyncio.run(run())
    assert [s.results[0].sum for s in scored] == [2 * made_up_reward([i])[0] for i in range(150)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_client_is_used_again_after_its_loop_was_closed_and_refuses_two_loops(service: FaultyService) -> None:
    client = AsyncClient(service.url, timeout_s=30.0, retry_for_s=0.0)
    for _ in range(2):  # each call of asyncio.run has a loop of its own
        assert asyncio.run(client.score_ids([1], [[2]])).results[0].length == 1

    async def from_two_loops() -> None:
        await client.score_ids([1], [[2]])
        with pytest.raises(RuntimeError, match="another event loop uses this client: make one for each loop"):
            await asyncio.to_thread(asyncio.run, client.score_ids([1], [[2]]))
        await client.close()

    asyncio.run(from_two_loops())
    gc.collect()  # sockets of a closed loop cannot be closed in it: they warn here, and in no other test
