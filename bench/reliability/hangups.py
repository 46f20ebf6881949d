"""Requests whose callers hang up midway: their work is dropped, and nothing is left of them."""

import asyncio
import random

import httpx

from bench.reliability.load import Json, Known, Outcome, ask, client_of, requests, with_answers
from bench.reliability.server import Server, serving

REQUESTS, WARM_UP, LEAVING, CONCURRENCY = 10_000, 2_000, 0.3, 24


def measure() -> tuple[Json, Json]:
    with serving("--max-batch-tokens", "2048") as server:
        return asyncio.run(_measure(server))


async def _measure(server: Server) -> tuple[Json, Json]:
    asked = await with_answers(server, requests(300, longest=30))
    await _round(server, asked, WARM_UP)
    before = server.resident_bytes()
    computed_before = server.metric("dense_reward_computed_tokens_total")
    outcome, left, stayed_tokens, sent_tokens = await _round(server, asked, REQUESTS)
    await asyncio.sleep(1.0)
    queue = server.metric("dense_reward_queue_tokens")
    after = server.resident_bytes()
    figures: Json = {"hangup_memory_growth": after / before - 1}
    return figures, {
        "requests": REQUESTS,
        "left": left,
        "resident_mb": {"before": before / 1e6, "after": after / 1e6},
        "queue_tokens_left": queue,
        "tokens": {
            "sent": sent_tokens,
            "of_those_who_stayed": stayed_tokens,
            "computed": server.metric("dense_reward_computed_tokens_total") - computed_before,
        },
        "those_who_stayed": outcome.told(),
    }


async def _round(server: Server, asked: list[Known], count: int) -> tuple[Outcome, int, int, int]:
    """What became of those who stayed, how many left, and the tokens of those who stayed and of all."""
    draw, outcome = random.Random(1), Outcome()
    left = stayed_tokens = sent_tokens = 0
    waiting = iter(range(count))

    async def keep_asking(client: httpx.AsyncClient) -> None:
        nonlocal left, stayed_tokens, sent_tokens
        for _ in waiting:
            known = draw.choice(asked)
            tokens = _tokens(known)
            sent_tokens += tokens
            if draw.random() >= LEAVING:
                await ask(client, known, outcome)
                stayed_tokens += tokens
                continue
            try:
                await asyncio.wait_for(client.post("/score", json=known.body), draw.uniform(0.0, 0.2))
            except TimeoutError:
                left += 1

    async with client_of(server) as client:
        await asyncio.gather(*(keep_asking(client) for _ in range(CONCURRENCY)))
    outcome.check()
    return outcome, left, stayed_tokens, sent_tokens


def _tokens(known: Known) -> int:
    prompt = known.body["prompt_ids"]
    assert isinstance(prompt, list)
    return len(prompt) + known.tokens
