"""Load near and above capacity: `overload` sends twice as much as the service can do, `soak` 80 % for half an hour."""

import asyncio

from bench.reliability.load import Json, closed_loop, open_loop, requests, with_answers
from bench.reliability.server import Server, percentile, serving

CLIENTS, CONCURRENCY = 3, 8
WARM_UP_S, CLOSED_S, OPEN_S = 5.0, 20.0, 60.0
EXCESS = 2.0
LIMITS = ("--max-batch-tokens", "4096", "--max-queue-tokens", "16384")
SOAK_SHARE, SOAK_WARM_UP_S, SOAK_S, SOAK_PARTS = 0.8, 60.0, 1800.0, 30
BURST = 300
"""Concurrent requests before a soak: they fill batches to --max-batch-tokens, so memory reaches its maximum."""


def measure_overload() -> tuple[Json, Json]:
    """Goodput, refusal time, wrong and lost answers at twice the capacity; and details."""
    with serving(*LIMITS) as server:
        return asyncio.run(_overload(server))


async def _overload(server: Server) -> tuple[Json, Json]:
    known = await with_answers(server, requests(600))
    await closed_loop(server, known, clients=CLIENTS, concurrency=CONCURRENCY, seconds=WARM_UP_S)
    closed, closed_s = await closed_loop(server, known, clients=CLIENTS, concurrency=CONCURRENCY, seconds=CLOSED_S)
    capacity = closed.answered_tokens / closed_s
    rate = EXCESS * closed.statuses[200] / closed_s
    opened, opened_s = await open_loop(server, known, clients=CLIENTS, per_second=rate, seconds=OPEN_S)
    figures: Json = {
        "goodput_ratio": opened.answered_tokens / opened_s / capacity,
        "refusal_p99_ms": 1e3 * percentile(opened.refused_s, 0.99),
        "wrong": closed.wrong + opened.wrong,
        "lost": closed.lost + opened.lost,
    }
    details: Json = {
        "requests_per_s": {"capacity": rate / EXCESS, "sent": rate},
        "scored_tokens_per_s": {"capacity": capacity, "under_excess": opened.answered_tokens / opened_s},
        "seconds": {"closed": closed_s, "open": opened_s},
        "closed": closed.summary(),
        "open": opened.summary(),
    }
    return figures, details


def measure_soak() -> tuple[Json, Json]:
    """Growth of memory and number of errors; and details."""
    with serving() as server:
        return asyncio.run(_soak(server))


async def _soak(server: Server) -> tuple[Json, Json]:
    known = await with_answers(server, requests(600))
    await closed_loop(server, known, clients=1, concurrency=BURST, seconds=SOAK_WARM_UP_S / 4)
    closed, closed_s = await closed_loop(
        server, known, clients=CLIENTS, concurrency=CONCURRENCY, seconds=SOAK_WARM_UP_S
    )
    rate = SOAK_SHARE * closed.statuses[200] / closed_s
    resident = [server.resident_bytes()]
    statuses, wrong, lost = closed.statuses, closed.wrong, closed.lost
    for _ in range(SOAK_PARTS):
        outcome, _ = await open_loop(server, known, clients=CLIENTS, per_second=rate, seconds=SOAK_S / SOAK_PARTS)
        resident.append(server.resident_bytes())
        statuses = statuses + outcome.statuses
        wrong, lost = wrong + outcome.wrong, lost + outcome.lost
    errors = sum(count for status, count in statuses.items() if status != 200) + wrong + lost
    details: Json = {
        "seconds": SOAK_S,
        "requests_per_s": rate,
        "resident_mb": [size / 1e6 for size in resident],
        "statuses": {str(status): count for status, count in statuses.items()},
    }
    return {"soak_memory_growth": resident[-1] / resident[1] - 1, "soak_errors": errors}, details
