"""A running queue, and what tests ask of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from dense_reward.batcher import Batcher, Computed
from dense_reward.engine.base import Engine, Trunk
from dense_reward.metrics import Metrics
from unruly_engines import PATIENCE_S, Gate

T = TypeVar("T")
BUDGET_TOKENS = 100


@asynccontextmanager
async def running(engine: Engine, *, max_batch_tokens: int = BUDGET_TOKENS) -> AsyncIterator[Batcher]:
    batcher = Batcher(engine, Metrics(), max_batch_tokens=max_batch_tokens, max_queue_tokens=1_000_000)
    loop = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        batcher.close()
        await soon(loop)


async def soon(answer: Awaitable[T]) -> T:
    """The answer; silence is a failure."""
    return await asyncio.wait_for(answer, PATIENCE_S)


def submitted(work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
    return asyncio.create_task(work)


async def held_by(gate: Gate, *tasks: "asyncio.Task[Computed]") -> None:
    """Returns once the gate holds a batch and the tasks have had their turn to queue up."""
    assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


def assert_named(computed: Computed, trunks: Sequence[Trunk]) -> None:
    """Every branch of every trunk, in order, with the scores of that very branch."""
    assert [len(branches) for branches in computed.scores] == [len(trunk.branches) for trunk in trunks]
    for prompt, branches in zip(trunks, computed.scores, strict=True):
        for branch, scores in zip(prompt.branches, branches, strict=True):
            assert scores.sft_logprob_S.tolist() == [float(prompt.prompt_P[0])] * len(branch.ids_T)
            assert scores.reference_logprob_S.tolist() == branch.ids_T.astype(float).tolist()
