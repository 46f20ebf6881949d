"""Hundreds of requests that share prompts, are cancelled, fail or lack memory: each gets only its own scores."""

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest
from batcher_harness import BUDGET_TOKENS, OneEngine, assert_named, running, soon, submitted
from dense_reward.batching.batcher import Computed
from dense_reward.errors import OutOfMemoryError, RequestError
from dense_reward.records import Branch, Trunk, Wants
from faulty_engines import Recorder, tokens_computed

REQUESTS = 300
ROOM_TOKENS = 80
SPOILED = 7
"""The prompt that breaks every batch that it is in."""


class Trouble:
    """Fails on the spoiled prompt, and runs out of memory: always above its capacity, at random below it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def __call__(self, trunks: Sequence[Trunk]) -> None:
        if any(one.prompt_P[0] == SPOILED for one in trunks):
            raise RuntimeError("spoiled")
        several = sum(len(one.branches) for one in trunks) > 1
        if tokens_computed(trunks) > ROOM_TOKENS or (several and self.draw.random() < 0.1):
            raise OutOfMemoryError("no room")


def request_of(r: int, draw: random.Random) -> list[Trunk]:
    """Trunks with one of a few prompts, and branches named after their request and index."""
    return [
        Trunk(
            np.full(draw.randrange(1, 12), SPOILED if draw.random() < 0.01 else 10 + draw.randrange(6), np.int32),
            tuple(
                Branch(np.full(n, 10_000 + 100 * r + 10 * i + g, np.int32), np.ones(n, dtype=bool))
                for g, n in enumerate(draw.choices((0, 1, 5, 20, 40, 95), (1, 9, 9, 9, 3, 0.1), k=draw.randrange(4)))
            ),
        )
        for i in range(draw.randrange(1, 5))
    ]


async def ask(batcher: OneEngine, request: list[Trunk], draw: random.Random) -> Computed:
    """Submits after a random delay; some requests are cancelled after another one."""
    for _ in range(draw.randrange(60)):
        await asyncio.sleep(0)
    answer = submitted(batcher.submit(request, Wants()))
    if draw.random() < 0.3:
        for _ in range(draw.randrange(60)):
            await asyncio.sleep(0)
        answer.cancel()
    return await answer


@pytest.mark.parametrize("seed", range(5))
def test_every_caller_that_stays_gets_its_own_scores_or_the_failure_of_its_batch(seed: int) -> None:
    draw = random.Random(seed)
    engine = Recorder(Trouble(seed), Trouble(seed + 100))
    requests = [request_of(r, draw) for r in range(REQUESTS)]

    async def ask_all() -> list[Computed | BaseException]:
        async with running(engine) as batcher:
            asked = [ask(batcher, request, random.Random(r + 1000 * seed)) for r, request in enumerate(requests)]
            return await soon(asyncio.gather(*asked, return_exceptions=True))

    kinds: set[type] = set()
    for request, answer in zip(requests, asyncio.run(ask_all()), strict=True):
        kinds.add(type(answer))
        if isinstance(answer, Computed):
            assert_named(answer, request)
        elif isinstance(answer, RequestError):
            assert answer.code == "out_of_memory"
            assert max(one.tokens for one in request) > ROOM_TOKENS
        else:
            assert isinstance(answer, asyncio.CancelledError) or str(answer) == "spoiled"
    assert kinds >= {Computed, asyncio.CancelledError, RuntimeError}
    for batch in engine.prepared:
        assert tokens_computed(batch) <= BUDGET_TOKENS or sum(len(one.branches) for one in batch) == 1
