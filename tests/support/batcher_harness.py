"""Runs a batcher around one engine, and helpers to submit to it and check its scores."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from dense_reward.batching.batcher import Batcher, Computed, cost_tokens
from dense_reward.records import Engine, Trunk, Wants
from dense_reward.telemetry.metrics import Metrics
from faulty_engines import PATIENCE_S, Gate

T = TypeVar("T")
BUDGET_TOKENS = 100


class OneEngine:
    """A Batcher whose requests all go to the same engine."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_batch_tokens: int, max_queue_tokens: int) -> None:
        self._engine = engine
        self.batcher = Batcher(metrics, max_batch_tokens=max_batch_tokens, max_queue_tokens=max_queue_tokens)
        self.admission, self.run, self.close = self.batcher.admission, self.batcher.run, self.batcher.close

    def submit(self, trunks: Sequence[Trunk], wants: Wants) -> Coroutine[object, object, Computed]:
        return self.batcher.submit(self._engine, trunks, wants)

    def cost_tokens(self, trunks: Sequence[Trunk]) -> int:
        return cost_tokens(self._engine, trunks)


@asynccontextmanager
async def running(engine: Engine, *, max_batch_tokens: int = BUDGET_TOKENS) -> AsyncIterator[OneEngine]:
    batcher = OneEngine(engine, Metrics(), max_batch_tokens=max_batch_tokens, max_queue_tokens=1_000_000)
    loop = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        batcher.close()
        await soon(loop)


async def soon(answer: Awaitable[T]) -> T:
    """The answer. Raises TimeoutError if none comes."""
    return await asyncio.wait_for(answer, PATIENCE_S)


def submitted(work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
    return asyncio.create_task(work)


async def held_by(gate: Gate, *tasks: "asyncio.Task[Computed]") -> None:
    """Returns once the gate holds a batch and the event loop has queued what the tasks submit."""
    assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


def assert_named(computed: Computed, trunks: Sequence[Trunk]) -> None:
    """The scores are those of `named_scores`: every branch of every trunk, in order."""
    assert [len(branches) for branches in computed.scores] == [len(trunk.branches) for trunk in trunks]
    for prompt, branches in zip(trunks, computed.scores, strict=True):
        for branch, scores in zip(prompt.branches, branches, strict=True):
            assert scores.sft_logprob_S.tolist() == [float(prompt.prompt_P[0])] * len(branch.ids_T)
            assert scores.reference_logprob_S.tolist() == branch.ids_T.astype(float).tolist()
