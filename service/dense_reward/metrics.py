"""What Prometheus is told. Knows numbers only, no requests and no devices."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144)


class Metrics:
    """One registry a service, so that several can live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "dense_reward_requests", "Answered requests", ["route", "status"], registry=self._registry
        )
        self._scored = Counter("dense_reward_scored_tokens", "Tokens that got a reward", registry=self._registry)
        self._stages = Histogram(
            "dense_reward_stage_seconds",
            "Seconds of a request by stage",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_tokens = Histogram(
            "dense_reward_batch_tokens", "Tokens of a batch", buckets=_TOKENS, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "dense_reward_batch_seconds", "Seconds of a batch", buckets=_SECONDS, registry=self._registry
        )
        self._queue = Gauge("dense_reward_queue_tokens", "Tokens let in and not yet answered", registry=self._registry)
        self._ready = Gauge("dense_reward_ready", "1 while the service can score", registry=self._registry)

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def scored(self, tokens: int) -> None:
        self._scored.inc(tokens)

    def stage(self, name: str, seconds: float) -> None:
        self._stages.labels(name).observe(seconds)

    def batch(self, tokens: int, seconds: float) -> None:
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def render(self, *, queue_tokens: int, ready: bool) -> bytes:
        """Prometheus' text format."""
        self._queue.set(queue_tokens)
        self._ready.set(ready)
        return generate_latest(self._registry)
