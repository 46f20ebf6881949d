"""Calls that can run for ever, as a chat template's loops: stopped after a limit."""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread, get_ident
from typing import TypeVar

Result = TypeVar("Result")


class StoppedError(BaseException):
    """Raised inside a call whose time is up. No Exception, so that the call does not take it for one of its own."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call on the thread `ident`, to be stopped at `due_s`."""

    due_s: float
    ident: int = field(default_factory=get_ident)
    is_stopped: bool = False


class _Watch:
    """One thread that stops calls whose time is up. It sleeps until the first of them is due, and begins with it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._calls: set[_Call] = set()
        self._wakes_s = math.inf
        self._thread: Thread | None = None

    def begin(self, call: _Call) -> None:
        with self._changed:
            self._calls.add(call)
            if self._thread is None or not self._thread.is_alive():  # not alive: in a process that was forked
                self._thread = Thread(target=self._run, daemon=True, name="time_limit")
                self._thread.start()
            elif call.due_s < self._wakes_s:
                self._changed.notify()

    def end(self, call: _Call) -> None:
        """After this the call is not stopped any more, also if its stop was due but has not been raised."""
        with self._changed:
            self._calls.discard(call)
            if call.is_stopped:
                _raise_in(call.ident, None)

    def _run(self) -> None:
        with self._changed:
            while True:
                now_s = time.monotonic()
                for call in [call for call in self._calls if call.due_s <= now_s]:
                    self._calls.remove(call)
                    call.is_stopped = True
                    _raise_in(call.ident, StoppedError)
                self._wakes_s = min((call.due_s for call in self._calls), default=math.inf)
                self._changed.wait(None if self._wakes_s == math.inf else max(0.0, self._wakes_s - now_s))


_WATCH = _Watch()


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises, on this thread. Raises TimeoutError if that takes longer than `limit_s` seconds.

    The call is then stopped at its next step in Python, so that it does not take time from other threads for ever. A
    single step that never ends, in C, ends with the process.
    """
    watched = _Call(time.monotonic() + limit_s)
    try:
        _WATCH.begin(watched)
        try:
            result = call()
        finally:
            _WATCH.end(watched)
    except StoppedError:
        if not watched.is_stopped:
            raise  # the stop of another call, around this one
    if watched.is_stopped:
        raise TimeoutError(f"not finished after {limit_s:g} seconds")
    return result


def _raise_in(ident: int, error: type[BaseException] | None) -> None:
    """Raise an error at the next step of a thread; None: withdraw one that was not raised yet."""
    stop = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), stop)
