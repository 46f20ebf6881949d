"""Work in processes side by side, and processes that end when they are told to. Must not know jobs."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from dense_reward.records import Result

Item = TypeVar("Item")
TERMINATED = 128 + signal.SIGTERM


def end_when_terminated() -> None:
    """Make SIGTERM an exit that is unwound, so that processes which this one has started are ended with it."""
    signal.signal(signal.SIGTERM, _leave)


def in_processes(processes: int, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results of a function of a module as they come, whatever their order.

    The first error, or leaving the iterator early, ends the other processes too.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_when_terminated) as pool:
        waiting = [pool.submit(_only, function, item) for item in items]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _only(function: Callable[[Item], Result], item: Item) -> Result:
    """A worker would take an exit for a failure of this item alone, and go on with the next that is queued."""
    try:
        return function(item)
    except SystemExit:
        os._exit(TERMINATED)


def _leave(signal_number: int, frame: object) -> None:
    sys.exit(TERMINATED)
