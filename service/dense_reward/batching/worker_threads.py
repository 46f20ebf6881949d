"""Bounded thread pools for calls that would block the event loop."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec

from dense_reward.cancellation import CANCELLATION, Cancellation
from dense_reward.records import Result

Arguments = ParamSpec("Arguments")
LARGE_TOKENS = 16_384
"""Tokens of a large request: 64 KiB of body. Its calls take up to seconds."""


class WorkerThreads:
    """Calls queue on the event loop, not in the pool, so cancelling a request also cancels its queued call."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)
        self._threads = threads
        self._begun_s: dict[Cancellation, float] = {}

    async def run(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Return the call's result, computed on a thread of the pool.

        A call that has begun cannot be stopped: if the request is cancelled, the thread stays busy until the call ends
        or looks at `check_cancelled`, which then raises.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        cancellation = Cancellation()
        context = copy_context()
        context.run(CANCELLATION.set, cancellation)
        self._begun_s[cancellation] = time.monotonic()
        try:
            future = self._pool.submit(partial(context.run, call, *args, **kwargs))
        except RuntimeError:
            self._end(cancellation)
            raise
        future.add_done_callback(lambda done: self._ended(loop, cancellation, done))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancellation.is_set = True
            raise

    def are_stuck(self, limit_s: float) -> bool:
        """Whether each thread has been busy with one call for longer than `limit_s`: no other call can begin."""
        before = time.monotonic() - limit_s
        return sum(begun <= before for begun in self._begun_s.values()) >= self._threads

    def shutdown(self) -> None:
        """Accept no more calls. Does not wait for those that have begun."""
        self._pool.shutdown(wait=False)

    def _ended(self, loop: asyncio.AbstractEventLoop, cancellation: Cancellation, _: "Future[Result]") -> None:
        # Runs on the thread of the pool: an asyncio.Semaphore is released only on its own loop, which may have ended.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._end, cancellation)

    def _end(self, cancellation: Cancellation) -> None:
        del self._begun_s[cancellation]
        self._free.release()


@dataclass(frozen=True, slots=True)
class Lanes:
    """Threads for small requests, and one for large ones, which therefore never delay the small ones.

    There is only one for large requests: each busy thread of Python delays the event loop by milliseconds.
    """

    small: WorkerThreads = field(default_factory=lambda: WorkerThreads(2, "encode"))
    large: WorkerThreads = field(default_factory=lambda: WorkerThreads(1, "encode_large"))

    def of(self, tokens: int) -> WorkerThreads:
        """The threads for the work of so many tokens."""
        return self.large if tokens > LARGE_TOKENS else self.small

    def shutdown(self) -> None:
        """See WorkerThreads.shutdown."""
        self.small.shutdown()
        self.large.shutdown()
