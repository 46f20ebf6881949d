"""The progress bar of `score_many`: items, and scored tokens per second. Needs tqdm only if it is drawn."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from dense_reward.client.results import ScoredItem


class Bar(Protocol):
    def show(self, items: Sequence[ScoredItem]) -> None: ...
    def close(self) -> None: ...


def bar(wanted: bool | None, total: int | None) -> Bar:
    """A bar if it is wanted; None: if standard error is a terminal and tqdm is installed.

    Raises ImportError, with the cure, if it is wanted and tqdm is missing.
    """
    installed = importlib.util.find_spec("tqdm") is not None
    if wanted and not installed:
        raise ImportError("progress=True needs tqdm: pip install tqdm")
    draw = wanted or (wanted is None and installed and sys.stderr.isatty())
    return _TqdmBar(total) if draw else _NoBar()


class _NoBar:
    def show(self, items: Sequence[ScoredItem]) -> None:
        """Draws nothing."""

    def close(self) -> None:
        """Nothing is drawn."""


class _TqdmBar:
    def __init__(self, total: int | None) -> None:
        self._bar = importlib.import_module("tqdm").tqdm(total=total, unit="item", desc="scoring")
        self._tokens = 0
        self._began_s = time.monotonic()

    def show(self, items: Sequence[ScoredItem]) -> None:
        self._tokens += sum(result.length for item in items for result in item.results)
        rate = self._tokens / max(time.monotonic() - self._began_s, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} scored tokens/s", refresh=False)
        self._bar.update(len(items))

    def close(self) -> None:
        self._bar.close()
