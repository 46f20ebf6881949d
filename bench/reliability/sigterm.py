"""SIGTERM under full load at random moments: whoever was let in is answered, and the process ends with code 0."""

import asyncio
import random
import time

import httpx

from bench.reliability.load import Json, Known, Outcome, ask_until_it_stops, client_of, requests, with_answers
from bench.reliability.server import Server, serving

MOMENTS, CONCURRENCY, GRACE_S = 20, 24, 30


def measure() -> tuple[Json, Json]:
    draw = random.Random(0)
    with serving() as server:
        asked = asyncio.run(with_answers(server, requests(100)))
    runs = [asyncio.run(_stopped(asked, draw.uniform(0.2, 2.0))) for _ in range(MOMENTS)]
    codes = [run["exit_code"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    unanswered = sum(int(str(run["unanswered"])) for run in runs) + sum(code != 0 for code in codes)
    wrong = sum(int(str(run["wrong"])) for run in runs)
    behind: Json = {"exit_codes": codes, "seconds": seconds, "wrong": wrong, "runs": runs}
    return {"sigterm_unanswered": unanswered + wrong}, behind


async def _stopped(asked: list[Known], after_s: float) -> Json:
    server = Server.start("--drain-s", str(GRACE_S))
    await asyncio.to_thread(server.wait_until_ready)
    outcome, over = Outcome(), asyncio.Event()

    async def keep_asking(client: httpx.AsyncClient, draw: random.Random) -> None:
        while not over.is_set() and await ask_until_it_stops(client, draw.choice(asked), outcome):
            pass

    async with client_of(server) as client:
        asking = [asyncio.create_task(keep_asking(client, random.Random(at))) for at in range(CONCURRENCY)]
        await asyncio.sleep(after_s)
        before = time.perf_counter()
        code = await asyncio.to_thread(server.stop)
        seconds = time.perf_counter() - before
        over.set()
        await asyncio.gather(*asking)
    outcome.check()
    return {"after_s": after_s, "seconds": seconds, "exit_code": code, "unanswered": outcome.lost, **outcome.told()}
