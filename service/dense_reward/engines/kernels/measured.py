"""Two ways to compute the same, timed on this machine."""

import time
from collections.abc import Callable

REPEATS = 3


def times_as_fast(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """How many times as fast `ours` is: the least seconds of some calls in turns, after one of each that warms up."""
    seconds = [(_seconds(theirs), _seconds(ours)) for _ in range(1 + REPEATS)][1:]
    return min(their_s for their_s, _ in seconds) / min(our_s for _, our_s in seconds)


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s
