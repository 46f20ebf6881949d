"""Load generators: requests with known answers, in a closed or open loop, and the outcome of each."""

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx2
import numpy as np

from bench.reliability.server import Server, percentile

Json = dict[str, object]
TOLERANCE_NATS = 1e-3  # in float32, batch mates change results by rounding
VOCABULARY, SEED = 256, 0
GROUPS = ((1, 0.5), (4, 0.3), (16, 0.2))
"""Pairs of the number of responses in a request, and its probability."""


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
    """Outcome of requests. `wrong`: answers with wrong rewards. `lost`: requests without an answer or a refusal."""

    statuses: Counter[int] = field(default_factory=Counter)
    answered_tokens: int = 0
    wrong: int = 0
    lost: int = 0
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    _answers: list[tuple[Known, bytes]] = field(default_factory=list)

    def answered(self, known: Known, content: bytes, seconds: float) -> None:
        """Stores the answer for `check`. Parsing it here would delay other answers and falsify their latencies."""
        self.answered_s.append(seconds)
        self.answered_tokens += known.tokens
        self._answers.append((known, content))

    def check(self) -> None:
        """Counts the wrong answers among those stored."""
        self.wrong += sum(not known.is_right(json.loads(content)) for known, content in self._answers)
        self._answers.clear()

    def summary(self) -> Json:
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
    """Makes distinct requests: a prompt of 10 to 29 ids, and 1 to 16 responses."""
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


async def with_answers(server: Server, sent: Sequence[Known], headers: Mapping[str, str] | None = None) -> list[Known]:
    """Adds the rewards that the service returns without other load."""
    async with client_of(server) as client:
        client.headers.update(headers or {})
        return [await _with_answer(client, known) for known in sent]


async def _with_answer(client: httpx2.AsyncClient, known: Known) -> Known:
    answer = await client.post("/score", json=known.body)
    answer.raise_for_status()
    return Known(known.body, known.tokens, tuple(np.array(row["reward"]) for row in answer.json()["results"]))


def client_of(server: Server, timeout_s: float = 120.0) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=server.url, timeout=timeout_s, limits=limits, trust_env=False)


async def ask(client: httpx2.AsyncClient, known: Known, outcome: Outcome) -> int | None:
    """Returns the status; None if the connection failed or broke.

    A refused connection is not counted as lost: the service no longer listens.
    """
    before = time.perf_counter()
    try:
        answer = await client.post("/score", json=known.body)
    except httpx2.ConnectError:
        return None
    except httpx2.TransportError:
        outcome.lost += 1
        return None
    seconds = time.perf_counter() - before
    outcome.statuses[answer.status_code] += 1
    if answer.status_code == httpx2.codes.OK:
        outcome.answered(known, answer.content, seconds)
    else:
        outcome.refused_s.append(seconds)
    return answer.status_code


async def ask_until_it_stops(client: httpx2.AsyncClient, known: Known, outcome: Outcome) -> bool:
    """Returns False if the service is stopping, that is if it answered 503 or no longer listens."""
    return await ask(client, known, outcome) not in {None, httpx2.codes.SERVICE_UNAVAILABLE}


async def closed_loop(
    server: Server, known: Sequence[Known], *, clients: int, concurrency: int, seconds: float
) -> tuple[Outcome, float]:
    """Each client keeps `concurrency` requests in flight. Returns the outcome, and the seconds to the last answer."""
    draw, outcome = random.Random(SEED), Outcome()
    started = time.perf_counter()

    async def keep_asking(client: httpx2.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            await ask(client, draw.choice(known), outcome)

    await _with_clients(
        server, clients, lambda client: asyncio.gather(*(keep_asking(client) for _ in range(concurrency)))
    )
    took_s = time.perf_counter() - started
    outcome.check()
    return outcome, took_s


async def open_loop(
    server: Server, known: Sequence[Known], *, clients: int, per_second: float, seconds: float
) -> tuple[Outcome, float]:
    """Each client sends its share of the rate at random times, without waiting. Returns like `closed_loop`."""
    draw, outcome = random.Random(SEED + 1), Outcome()
    started = time.perf_counter()

    async def keep_sending(client: httpx2.AsyncClient) -> None:
        sent: list[asyncio.Task[int | None]] = []
        due = started
        while (due := due + draw.expovariate(per_second / clients)) - started < seconds:
            await asyncio.sleep(due - time.perf_counter())
            sent.append(asyncio.create_task(ask(client, draw.choice(known), outcome)))
        await asyncio.gather(*sent)

    await _with_clients(server, clients, keep_sending)
    took_s = time.perf_counter() - started
    outcome.check()
    return outcome, took_s


async def _with_clients(server: Server, count: int, work: Callable[[httpx2.AsyncClient], Awaitable[object]]) -> None:
    gc.collect()
    gc.freeze()  # garbage collection here would count as latency of the service
    clients = [client_of(server) for _ in range(count)]
    try:
        await asyncio.gather(*map(work, clients))
    finally:
        for client in clients:
            await client.aclose()
