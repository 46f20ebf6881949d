"""Calls on threads: what ends them early, and when none can begin."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from dense_reward.batching.worker_threads import LARGE_TOKENS, Lanes, WorkerThreads
from dense_reward.cancellation import CancelledWorkError, check_cancelled
from faulty_engines import PATIENCE_S, Gate


def test_a_call_that_asks_ends_once_its_request_is_cancelled() -> None:
    begun, ended = threading.Event(), threading.Event()

    def steps() -> None:
        begun.set()
        try:
            while True:
                check_cancelled()
        except CancelledWorkError:
            ended.set()
            raise

    async def run() -> None:
        threads = WorkerThreads(1, "test")
        call = asyncio.create_task(threads.run(steps))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        assert not ended.is_set()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.wait_for(threads.run(lambda: 7), PATIENCE_S) == 7, "the thread is free again"
        threads.shutdown()

    asyncio.run(run())
    assert ended.is_set()


def test_another_call_on_the_same_thread_is_not_cancelled_with_it() -> None:
    async def run() -> None:
        threads, gate = WorkerThreads(1, "test"), Gate()
        first = asyncio.create_task(threads.run(gate, ()))
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        first.cancel()
        second = asyncio.create_task(threads.run(check_cancelled))
        gate.opened.set()
        await asyncio.wait_for(second, PATIENCE_S)
        threads.shutdown()

    asyncio.run(run())
    check_cancelled()  # outside of any call nothing is cancelled


def test_threads_are_stuck_if_each_is_busy_for_long() -> None:
    async def run() -> Iterator[bool]:
        threads, gates = WorkerThreads(2, "test"), [Gate(), Gate()]
        calls = []
        found = [threads.are_stuck(0.0)]
        for gate in gates:
            calls.append(asyncio.create_task(threads.run(gate, ())))
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
            found += [threads.are_stuck(0.0), threads.are_stuck(PATIENCE_S)]
        gates[0].opened.set()
        await calls[0]
        found.append(threads.are_stuck(0.0))
        gates[1].opened.set()
        await calls[1]
        threads.shutdown()
        return iter(found)

    assert list(asyncio.run(run())) == [False, False, False, True, False, False]


def test_a_large_request_takes_no_thread_of_small_ones() -> None:
    async def run() -> None:
        lanes, gate = Lanes(), Gate()
        large = [asyncio.create_task(lanes.of(LARGE_TOKENS + 1).run(gate, ())) for _ in range(5)]
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        assert await asyncio.wait_for(lanes.of(LARGE_TOKENS).run(lambda: 7), PATIENCE_S) == 7
        gate.opened.set()
        await asyncio.gather(*large)
        lanes.shutdown()

    asyncio.run(run())
