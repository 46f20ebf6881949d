"""Twice as much as the service can do: what it still does, how fast it refuses the rest, and whether all is right."""

import asyncio

from bench.reliability.load import Json, closed_loop, open_loop, requests, with_answers
from bench.reliability.server import Server, percentile, serving

CLIENTS, CONCURRENCY = 3, 8
WARM_UP_S, CLOSED_S, OPEN_S = 5.0, 20.0, 60.0
EXCESS = 2.0
LIMITS = ("--max-batch-tokens", "4096", "--max-queue-tokens", "16384")


def measure() -> tuple[Json, Json]:
    """The figures, and what is behind them."""
    with serving(*LIMITS) as server:
        return asyncio.run(_measure(server))


async def _measure(server: Server) -> tuple[Json, Json]:
    asked = await with_answers(server, requests(600))
    await closed_loop(server, asked, clients=CLIENTS, concurrency=CONCURRENCY, seconds=WARM_UP_S)
    closed, closed_s = await closed_loop(server, asked, clients=CLIENTS, concurrency=CONCURRENCY, seconds=CLOSED_S)
    capacity = closed.answered_tokens / closed_s
    rate = EXCESS * closed.statuses[200] / closed_s
    opened, opened_s = await open_loop(server, asked, clients=CLIENTS, per_second=rate, seconds=OPEN_S)
    figures: Json = {
        "goodput_ratio": opened.answered_tokens / opened_s / capacity,
        "refusal_p99_ms": 1e3 * percentile(opened.refused_s, 0.99),
        "wrong": closed.wrong + opened.wrong,
        "lost": closed.lost + opened.lost,
    }
    behind: Json = {
        "requests_per_s": {"capacity": rate / EXCESS, "sent": rate},
        "scored_tokens_per_s": {"capacity": capacity, "under_excess": opened.answered_tokens / opened_s},
        "seconds": {"closed": closed_s, "open": opened_s},
        "closed": closed.told(),
        "open": opened.told(),
    }
    return figures, behind
