"""Runs tasks in parallel processes, and makes SIGTERM end a process together with its children."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from dense_reward.records import Result

Task = TypeVar("Task")
TERMINATED = 128 + signal.SIGTERM


def exit_on_sigterm() -> None:
    """On SIGTERM, exit by SystemExit: `finally` and `with` blocks run, and stop the processes that they started."""
    signal.signal(signal.SIGTERM, _exit)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """`exit_on_sigterm` within the block; the previous handler is restored after it."""
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_processes(processes: int, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """Results of a module-level function for all tasks, in the order of completion.

    The first error ends the other processes too; so does closing the iterator early.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), exit_on_sigterm) as pool:
        futures = [pool.submit(_run_task, function, task) for task in tasks]
        try:
            for done in as_completed(futures):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _run_task(function: Callable[[Task], Result], task: Task) -> Result:
    """Runs a task. On SystemExit it ends the worker: the pool would treat it as a failed task and start the next."""
    try:
        return function(task)
    except SystemExit:
        os._exit(TERMINATED)


def _exit(signal_number: int, frame: object) -> None:
    sys.exit(TERMINATED)
