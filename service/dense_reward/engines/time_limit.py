"""Calls that can run for ever, as a chat template's loops: stopped after a limit."""

import ctypes
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

Result = TypeVar("Result")


class StoppedError(BaseException):
    """Raised inside a call whose time is up. No Exception, so that the call does not take it for one of its own."""


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises. Raises TimeoutError if that takes longer than `limit_s` seconds.

    The call is then stopped at its next step in Python, so that it does not take time from other threads for ever. A
    single step that never ends, in C, ends with the process.
    """
    ending = Lock()  # held while the call is stopped, so that its thread does not end meanwhile
    answers: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # raised again for the caller
            answers.put((None, error))
        with ending:
            pass

    thread = Thread(target=run, daemon=True, name="limited")
    thread.start()
    try:
        result, error = answers.get(timeout=limit_s)
    except Empty:
        with ending:  # an ended thread's identifier can be another's
            if thread.is_alive() and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(StoppedError))
        raise TimeoutError(f"not finished after {limit_s:g} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
