"""What a client says while it works: the bar of `score_many`, and its retries, in the log `dense_reward.client`.

A client that waits in silence looks like a program that hangs. Many calls of one client share one `RetryLog`, so an
outage is one warning, not one for each call. The bar needs tqdm only if it is drawn.
"""

import importlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dense_reward.client.results import ScoredItem
from dense_reward.credentials import without_credentials

LOGGER = logging.getLogger("dense_reward.client")
FIRST_AFTER_S = 2.0
AGAIN_AFTER_S = 60.0


@dataclass(slots=True)
class _Outage:
    since_s: float
    next_line_s: float
    attempts: int = 0
    warned: bool = False


@dataclass(slots=True)
class RetryLog:
    """One warning once a URL has failed for 2 s; others after 60 s, and each time that the outage is twice as long."""

    _outages: dict[str, _Outage] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, url: str, error: Exception, now_s: float, delay_s: float, limit_s: float) -> None:
        """An attempt failed, and the next one follows after `delay_s`. `limit_s`: when the caller gives up."""
        with self._lock:
            outage = self._outages.setdefault(url, _Outage(now_s, now_s + FIRST_AFTER_S))
            outage.attempts += 1
            # The next attempt can be far away, so the line is written before the wait in which it becomes due.
            if now_s + delay_s < outage.next_line_s:
                return
            outage.warned = True
            outage.next_line_s = outage.since_s + max(AGAIN_AFTER_S, 2 * (now_s + delay_s - outage.since_s))
            waited_s, attempts = now_s - outage.since_s, outage.attempts
        message = "%s is not available (%s): retrying for up to %.0f s; %d attempts failed in %.0f s"
        LOGGER.warning(message, without_credentials(url), error, limit_s, attempts, waited_s)

    def answered(self, url: str, now_s: float) -> None:
        """An attempt succeeded. Writes a line (level info) if there was a warning."""
        if url not in self._outages:
            return
        with self._lock:
            outage = self._outages.pop(url, None)
        if outage is not None and outage.warned:
            message = "%s is available again after %.0f s and %d failed attempts"
            LOGGER.info(message, without_credentials(url), now_s - outage.since_s, outage.attempts)


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
