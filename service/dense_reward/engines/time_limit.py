"""Calls that can run for ever, as a chat template's loops: ended for the caller after a limit."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises. Raises TimeoutError if that takes longer than `limit_s` seconds.

    The call itself cannot be stopped: its thread goes on, but no longer than the process.
    """
    answers: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # raised again for the caller
            answers.put((None, error))

    Thread(target=run, daemon=True, name="limited").start()
    try:
        result, error = answers.get(timeout=limit_s)
    except Empty:
        raise TimeoutError(f"not finished after {limit_s:g} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
