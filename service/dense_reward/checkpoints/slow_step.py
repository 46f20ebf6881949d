"""Says what a command is busy with, if that takes a while: a step that ends soon stays silent."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from dense_reward.records import Report

SILENT_S = 2.0
"""Seconds after which a user wonders whether a command hangs."""


@contextmanager
def slow_step(report: Report, words: str) -> Iterator[None]:
    """Reports `words`, such as `loading runs/a`, once the block has taken SILENT_S. Called from another thread."""
    timer = Timer(SILENT_S, report, (f"{words} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
