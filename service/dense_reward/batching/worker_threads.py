"""A few threads beside the event loop, for what would hold it up. Knows nothing of what they do."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec

from dense_reward.records import Result

Arguments = ParamSpec("Arguments")


class WorkerThreads:
    """Calls wait on the event loop until a thread is free, so that a caller who leaves takes them along."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)

    async def run(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """What the call gives. Once it has begun it is not stopped, and its thread is not free before it ends."""
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
        """Without waiting for what has begun."""
        self._pool.shutdown(wait=False)

    def _release(self, loop: asyncio.AbstractEventLoop, _: "Future[Result]") -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._free.release)
