"""Which of several services gets a request. Equal prompts go to the same one, so that it can share their computation.

A service that fails or refuses is left alone for as long as it asked, or for a growing random time. Meanwhile its
requests go to the others; if all are left alone, requests wait. Pure: sends nothing, and gets the time from its caller.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dense_reward.client.errors import ServiceUnavailableError
from dense_reward.client.http import Backoff, Failure


@dataclass(slots=True)
class _Service:
    url: str
    rests_until_s: float = 0.0
    failures: int = 0


class Routes:
    """The services of one `score_many`. Threads share it."""

    def __init__(self, urls: Sequence[str], backoff: Backoff, limit_s: float) -> None:
        self.limit_s = limit_s
        self._backoff = backoff
        self._services = [_Service(url) for url in urls]
        self._attempts = 0
        self._failing_since_s: float | None = None
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self._services)

    def preferred(self, item: Mapping[str, object]) -> list[int]:
        """The services in the order in which they get this prompt. If one is lost, only its own prompts move."""
        if len(self._services) == 1:
            return [0]
        prompt = prompt_bytes(item)
        weights = [hashlib.blake2b(prompt, key=service.url.encode()[-64:]).digest() for service in self._services]
        return sorted(range(len(weights)), key=weights.__getitem__, reverse=True)

    def choose(self, order: Sequence[int], now_s: float) -> tuple[int, float]:
        """A service, and the seconds to wait before a request is sent to it."""
        with self._lock:
            waits_s = [max(0.0, self._services[index].rests_until_s - now_s) for index in order]
        position = min(range(len(order)), key=waits_s.__getitem__)
        return order[position], waits_s[position]

    def url(self, index: int) -> str:
        return self._services[index].url

    def answered(self, index: int) -> None:
        with self._lock:
            self._services[index].failures = 0
            self._failing_since_s, self._attempts = None, 0

    def failed(self, index: int, failure: Failure, now_s: float, jitter: float) -> None:
        """Leaves the service alone for a while. Failures that arrive meanwhile are of the same outage."""
        with self._lock:
            service = self._services[index]
            self._attempts += 1
            if self._failing_since_s is None:
                self._failing_since_s = now_s
            if now_s < service.rests_until_s:
                return
            delay_s = failure.delay_s(self._backoff, service.failures, jitter)
            service.failures += 1
            service.rests_until_s = now_s + delay_s

    def check_patience(self, failure: Failure, now_s: float, wait_s: float) -> None:
        """Raises ServiceUnavailableError if no service would have answered anything for `limit_s` after the wait."""
        with self._lock:
            since_s = now_s if self._failing_since_s is None else self._failing_since_s
            attempts = self._attempts
        if now_s + wait_s - since_s > self.limit_s:
            raise ServiceUnavailableError(str(failure.error), attempts, now_s - since_s) from failure.error


@dataclass(slots=True)
class Route:
    """The attempts of one request of `score_many`. The same methods as Patience."""

    routes: Routes
    order: Sequence[int]
    failures: int = 0
    _at: int = field(init=False, default=0)

    @property
    def url(self) -> str:
        return self.routes.url(self._at)

    @property
    def limit_s(self) -> float:
        return self.routes.limit_s

    def first_delay_s(self, now_s: float) -> float:
        self._at, delay_s = self.routes.choose(self.order, now_s)
        return delay_s

    def delay_s(self, failure: Failure, now_s: float, jitter: float) -> float:
        """Seconds to wait before the next attempt, at the service `url`. Raises like Patience."""
        self.failures += 1
        self.routes.failed(self._at, failure, now_s, jitter)
        at, delay_s = self.routes.choose(self.order, now_s)
        self.routes.check_patience(failure, now_s, delay_s)
        self._at = at
        return delay_s

    def answered(self) -> None:
        self.routes.answered(self._at)


def prompt_bytes(item: Mapping[str, object]) -> bytes:
    """What is equal for items of one prompt, whose computation a service can share."""
    for name in ("prompt_ids", "token_ids"):
        if name in item:
            return np.asarray(item[name], dtype=np.int64).tobytes()
    messages = item.get("messages")
    prompt = messages[:-1] if isinstance(messages, Sequence) else item.get("prompt", item.get("text"))
    return json.dumps(prompt, default=str, sort_keys=True).encode()
