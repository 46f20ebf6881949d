"""Calls that can run for ever, as a chat template's loops: stopped after a limit.

A stop is an error that another thread raises in this one, at whatever step of Python it is. So the thread that is
stopped holds no lock while it takes steps: an error between "acquired" and "held" would keep the lock for ever.
"""

import ctypes
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock, Thread, get_ident, local
from typing import TypeVar

Result = TypeVar("Result")
_CALL: Callable[[Callable[[], object]], object] = operator.call


class StoppedError(BaseException):
    """Raised inside a call whose time is up. No Exception, so that the call does not take it for one of its own."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call on the thread `ident`, to be stopped at `due_s` unless it is over. `outer`: the call around it."""

    due_s: float
    outer: "_Call | None"
    ident: int = field(default_factory=get_ident)
    is_over: bool = False
    is_stopped: bool = False


class _Here(local):
    """The innermost call of each thread."""

    call: _Call | None = None


class _Watch:
    """One thread that stops calls whose time is up. It sleeps until the first of them is due, and begins with it."""

    def __init__(self) -> None:
        self._stopping = Lock()
        self._begun = deque[_Call]()
        self._wakes_s = math.inf
        self._woken = SimpleQueue[None]()
        self._thread: Thread | None = None
        self._starting = Lock()

    def begin(self, call: _Call) -> None:
        if self._thread is None or not self._thread.is_alive():  # not alive: in a process that was forked
            self._start()
        self._begun.append(call)
        if call.due_s < self._wakes_s:
            self._woken.put(None)

    def waits_for_a_stop(self) -> Iterator[object]:
        """Two steps, to be taken by one call of C, in which no error is raised: no stop is under way after them."""
        steps: tuple[Callable[[], object], ...] = (self._stopping.acquire, self._stopping.release)
        return map(_CALL, steps)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = Thread(target=self._run, daemon=True, name="time_limit")
                self._thread.start()

    def _run(self) -> None:
        calls: list[tuple[float, int, _Call]] = []
        numbers = count()  # calls that are due at the same time are not compared
        while True:
            while self._begun:
                begun = self._begun.popleft()
                heappush(calls, (begun.due_s, next(numbers), begun))
            now_s = time.monotonic()
            while calls and (calls[0][-1].is_over or calls[0][0] <= now_s):
                self._stop(heappop(calls)[-1])
            self._wakes_s = calls[0][0] if calls else math.inf
            if self._begun:
                continue  # its thread may have compared with an earlier time to wake
            with suppress(Empty):
                self._woken.get(timeout=max(0.0, self._wakes_s - now_s) if calls else None)

    def _stop(self, call: _Call) -> None:
        with self._stopping:
            if not call.is_over:
                call.is_stopped = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(call.ident), ctypes.py_object(StoppedError))


_WATCH = _Watch()
_HERE = _Here()


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises, on this thread. Raises TimeoutError if that takes longer than `limit_s` seconds.

    The call is then stopped at its next step in Python, so that it does not take time from other threads for ever. A
    single step that never ends, in C, ends with the process.
    """
    watched = _Call(time.monotonic() + limit_s, _HERE.call)
    waits = _WATCH.waits_for_a_stop()
    try:
        try:
            _HERE.call = watched
            _WATCH.begin(watched)
            result = call()
        finally:
            # CPython raises a stop only after a call, at a jump back or as a function begins: not within these three
            # lines. If there is one of this call, it is raised right after them, and never later.
            watched.is_over = True
            _HERE.call = watched.outer
            deque(waits, 0)
    except StoppedError:
        if not watched.is_stopped or _is_stopped(watched.outer):
            raise  # the stop of another call, around this one
    if watched.is_stopped:
        raise TimeoutError(f"not finished after {limit_s:g} seconds")
    return result


def _is_stopped(call: _Call | None) -> bool:
    """Whether a call, or one around it, was stopped."""
    return call is not None and (call.is_stopped or _is_stopped(call.outer))
