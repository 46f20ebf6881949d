"""Requests with known answers, sent as fast as they are answered or at a rate, and what became of each."""

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from bench.reliability.server import Server, percentile

Json = dict[str, object]
TOLERANCE_NATS = 1e-3  # float32, whatever stands beside a sequence in its batch
VOCABULARY, SEED = 256, 0
GROUPS = ((1, 0.5), (4, 0.3), (16, 0.2))
"""Responses of a request, and how often."""


@dataclass(frozen=True, slots=True)
class Known:
    """A request and its rewards."""

    body: Json
    tokens: int
    rewards: tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...] = ()

    def is_right(self, answer: Json) -> bool:
        results = answer["results"]
        assert isinstance(results, list)
        found = [np.array(row["reward"]) for row in results]
        return len(found) == len(self.rewards) and all(
            a.shape == b.shape and bool(np.all(np.abs(a - b) <= TOLERANCE_NATS))
            for a, b in zip(found, self.rewards, strict=True)
        )


@dataclass(slots=True)
class Outcome:
    """What became of requests. `wrong` answers had other rewards, `lost` requests got none and no refusal."""

    statuses: Counter[int] = field(default_factory=Counter)
    answered_tokens: int = 0
    wrong: int = 0
    lost: int = 0
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    _answers: list[tuple[Known, bytes]] = field(default_factory=list)

    def answered(self, known: Known, content: bytes, seconds: float) -> None:
        """Looked at later: while one answer is, others would lie unread, and seem to have taken longer."""
        self.answered_s.append(seconds)
        self.answered_tokens += known.tokens
        self._answers.append((known, content))

    def check(self) -> None:
        """Counts the answers that are wrong."""
        self.wrong += sum(not known.is_right(json.loads(content)) for known, content in self._answers)
        self._answers.clear()

    def told(self) -> Json:
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": self.wrong,
            "lost": self.lost,
            "answered_p50_ms": 1e3 * percentile(self.answered_s, 0.5),
            "answered_p99_ms": 1e3 * percentile(self.answered_s, 0.99),
            "refused_p50_ms": 1e3 * percentile(self.refused_s, 0.5),
            "refused_p99_ms": 1e3 * percentile(self.refused_s, 0.99),
        }


def requests(count: int, *, longest: int = 60) -> list[Known]:
    """No two alike: a prompt of 10 to 30 ids, and 1 to 16 responses."""
    draw = random.Random(SEED)
    sizes, weights = [size for size, _ in GROUPS], [weight for _, weight in GROUPS]
    made = []
    for _ in range(count):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(10, 30))]
        lengths = [draw.randrange(10, longest) for _ in range(draw.choices(sizes, weights)[0])]
        responses = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
        body: Json = {"prompt_ids": prompt, "response_ids": responses, "include": ["reward"]}
        made.append(Known(body, sum(lengths)))
    return made


async def with_answers(server: Server, asked: Sequence[Known], headers: Mapping[str, str] | None = None) -> list[Known]:
    """The same, with the rewards that the service gives while nothing else is asked."""
    async with client_of(server) as client:
        client.headers.update(headers or {})
        return [await _with_answer(client, known) for known in asked]


async def _with_answer(client: httpx.AsyncClient, known: Known) -> Known:
    answer = await client.post("/score", json=known.body)
    answer.raise_for_status()
    return Known(known.body, known.tokens, tuple(np.array(row["reward"]) for row in answer.json()["results"]))


def client_of(server: Server, timeout_s: float = 120.0) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=timeout_s, limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, known: Known, outcome: Outcome) -> int | None:
    """Its status, None where there was none: nobody listens there any more."""
    before = time.perf_counter()
    try:
        answer = await client.post("/score", json=known.body)
    except httpx.ConnectError:
        return None
    except httpx.TransportError:
        outcome.lost += 1
        return None
    seconds = time.perf_counter() - before
    outcome.statuses[answer.status_code] += 1
    if answer.status_code == httpx.codes.OK:
        outcome.answered(known, answer.content, seconds)
    else:
        outcome.refused_s.append(seconds)
    return answer.status_code


async def ask_until_it_stops(client: httpx.AsyncClient, known: Known, outcome: Outcome) -> bool:
    """Whether to go on: a service that says that it stops is not asked again."""
    return await ask(client, known, outcome) not in {None, httpx.codes.SERVICE_UNAVAILABLE}


async def closed_loop(
    server: Server, asked: Sequence[Known], *, clients: int, concurrency: int, seconds: float
) -> tuple[Outcome, float]:
    """Each of the clients keeps so many requests in flight. What became of them, and the seconds until the last."""
    draw, outcome = random.Random(SEED), Outcome()
    started = time.perf_counter()

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            await ask(client, draw.choice(asked), outcome)

    await _with_clients(
        server, clients, lambda client: asyncio.gather(*(keep_asking(client) for _ in range(concurrency)))
    )
    took_s = time.perf_counter() - started
    outcome.check()
    return outcome, took_s


async def open_loop(
    server: Server, asked: Sequence[Known], *, clients: int, per_second: float, seconds: float
) -> tuple[Outcome, float]:
    """Each of the clients sends its share of the rate, whatever becomes of it, at random moments."""
    draw, outcome = random.Random(SEED + 1), Outcome()
    started = time.perf_counter()

    async def keep_sending(client: httpx.AsyncClient) -> None:
        sent: list[asyncio.Task[int | None]] = []
        due = started
        while (due := due + draw.expovariate(per_second / clients)) - started < seconds:
            await asyncio.sleep(due - time.perf_counter())
            sent.append(asyncio.create_task(ask(client, draw.choice(asked), outcome)))
        await asyncio.gather(*sent)

    await _with_clients(server, clients, keep_sending)
    took_s = time.perf_counter() - started
    outcome.check()
    return outcome, took_s


async def _with_clients(server: Server, count: int, work: Callable[[httpx.AsyncClient], Awaitable[object]]) -> None:
    gc.collect()
    gc.freeze()  # a collector at work here would be told as a service that is slow
    clients = [client_of(server) for _ in range(count)]
    try:
        await asyncio.gather(*map(work, clients))
    finally:
        for client in clients:
            await client.aclose()
