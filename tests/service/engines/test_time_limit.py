"""A call that takes too long is stopped, and its thread goes on."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from dense_reward.engines.time_limit import within
from faulty_engines import PATIENCE_S
from jinja2.sandbox import ImmutableSandboxedEnvironment


def loops() -> None:
    while True:
        with suppress(Exception):  # what a call does with its own errors must not keep it alive
            time.sleep(0)


def renders() -> None:
    """Each loop of a template is bounded by the sandbox; loops in loops take years."""
    loop = "{% for i in range(90000) %}"
    ImmutableSandboxedEnvironment().from_string(loop * 4 + "{% endfor %}" * 4).render()


@pytest.mark.parametrize("call", [loops, renders])
def test_a_call_whose_time_is_up_is_stopped(call: Callable[[], None]) -> None:
    with pytest.raises(TimeoutError, match="not finished after"):
        within(0.2, call)
    assert within(PATIENCE_S, lambda: 7) == 7, "the thread goes on with its next call"


def test_a_call_around_a_stopped_one_goes_on() -> None:
    def outer() -> str:
        with pytest.raises(TimeoutError, match=r"0\.1 seconds"):
            within(0.1, loops)
        return "done"

    assert within(PATIENCE_S, outer) == "done"


def test_the_shorter_limit_around_a_call_stops_it_too() -> None:
    with pytest.raises(TimeoutError, match=r"0\.1 seconds"):
        within(0.1, lambda: within(PATIENCE_S, loops))


def test_a_call_that_stops_others_for_ever_is_stopped_too() -> None:
    """Its own stop may come at the same step as that of a call within it, and is then not lost."""

    def outer() -> None:
        while True:
            with suppress(TimeoutError):
                within(0.0003, loops)

    for _ in range(20):
        with pytest.raises(TimeoutError, match=r"0\.003 seconds"):
            within(0.003, outer)


def test_a_thread_that_is_stopped_at_its_last_step_is_not_stopped_later() -> None:
    """The limits are about as long as the calls, so many stops come while a call ends: no lock may be left then."""
    stopped = 0

    def work() -> None:
        nonlocal stopped
        for turn in range(300):
            try:
                within(0.0004, partial(list, range(turn * 200)))
            except TimeoutError:
                stopped += 1

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work) for _ in range(3)]:
            done.result(PATIENCE_S)
    assert stopped


def test_what_a_call_returns_or_raises_is_its_callers() -> None:
    assert within(PATIENCE_S, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(PATIENCE_S, lambda: 1 // 0)
