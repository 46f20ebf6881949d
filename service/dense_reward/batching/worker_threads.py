"""A bounded thread pool for calls that would block the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec

from dense_reward.records import Result

Arguments = ParamSpec("Arguments")


class WorkerThreads:
    """Calls queue on the event loop, not in the pool, so cancelling a request also cancels its queued call."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)

    async def run(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Return the call's result, computed on a thread of the pool.

        A call that has begun cannot be stopped: if the request is cancelled, the thread stays busy until the call ends.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        try:
            future = self._pool.submit(call, *args, **kwargs)
        except RuntimeError:
            self._free.release()
            raise
        future.add_done_callback(lambda done: self._release(loop, done))
        return await asyncio.wrap_future(future)

    def shutdown(self) -> None:
        """Accept no more calls. Does not wait for those that have begun."""
        self._pool.shutdown(wait=False)

    def _release(self, loop: asyncio.AbstractEventLoop, _: "Future[Result]") -> None:
        # Runs on the thread of the pool: an asyncio.Semaphore is released only on its own loop, which may have ended.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._free.release)
