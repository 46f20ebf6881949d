"""Half an hour at most of what the service can do: memory stays, nothing fails."""

import asyncio

from bench.reliability.load import Json, closed_loop, open_loop, requests, with_answers
from bench.reliability.server import Server, serving

SHARE, WARM_UP_S, SOAK_S, PARTS = 0.8, 60.0, 1800.0, 30
BURST = 300
"""Requests at once, before: they fill batches to --max-batch-tokens, and so memory as far as it may ever be."""


def measure() -> tuple[Json, Json]:
    with serving() as server:
        return asyncio.run(_measure(server))


async def _measure(server: Server) -> tuple[Json, Json]:
    asked = await with_answers(server, requests(600))
    await closed_loop(server, asked, clients=1, concurrency=BURST, seconds=WARM_UP_S / 4)
    closed, closed_s = await closed_loop(server, asked, clients=3, concurrency=8, seconds=WARM_UP_S)
    rate = SHARE * closed.statuses[200] / closed_s
    resident = [server.resident_bytes()]
    statuses, wrong, lost = closed.statuses, closed.wrong, closed.lost
    for _ in range(PARTS):
        outcome, _ = await open_loop(server, asked, clients=3, per_second=rate, seconds=SOAK_S / PARTS)
        resident.append(server.resident_bytes())
        statuses = statuses + outcome.statuses
        wrong, lost = wrong + outcome.wrong, lost + outcome.lost
    errors = sum(count for status, count in statuses.items() if status != 200) + wrong + lost
    behind: Json = {
        "seconds": SOAK_S,
        "requests_per_s": rate,
        "resident_mb": [size / 1e6 for size in resident],
        "statuses": {str(status): count for status, count in statuses.items()},
    }
    return {"soak_memory_growth": resident[-1] / resident[1] - 1, "soak_errors": errors}, behind
