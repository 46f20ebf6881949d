"""A call that takes too long fails for its caller, and its thread ends."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

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
    for thread in threading.enumerate():
        if thread.name == "limited":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_what_a_call_returns_or_raises_is_its_callers() -> None:
    assert within(PATIENCE_S, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(PATIENCE_S, lambda: 1 // 0)
