"""The metrics for Prometheus. Knows numbers only, no requests and no devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from dense_reward.telemetry.running_stats import RunningStats

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144)
_RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WINDOW_TOKENS = 100_000
"""Means of rewards cover about this many tokens, with exponentially more weight on later ones."""


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """The state of the service when metrics are read: revisions by pair, bytes by device."""

    ready: bool
    queue_tokens: int
    tokens_per_s: float
    revisions: Mapping[str, str]
    memory_bytes: Mapping[str, int]
    results_bytes: int = 0


class Metrics:
    """The metrics of one service. Each has its own registry, so that several can run in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Answered requests", "route", "status")
        self._request_seconds = self._histogram("request_seconds", "Seconds to answer", _SECONDS, "route")
        self._scored = self._counter("scored_tokens", "Tokens that got a reward", "model")
        self._stages = self._histogram("stage_seconds", "Seconds of a request by stage", _SECONDS, "stage")
        self._batch_tokens = self._histogram("batch_tokens", "Tokens of a batch", _TOKENS)
        self._batch_fill = self._histogram(
            "batch_fill_ratio", "Tokens of a batch divided by --max-batch-tokens", _RATIO
        )
        self._batch_seconds = self._histogram("batch_seconds", "Seconds of a batch", _SECONDS)
        self._computed = self._counter("computed_tokens", "Tokens that went through the models")
        self._shared = self._counter("shared_tokens", "Tokens not computed again, because sequences began alike")
        self._reused = self._counter("reused_tokens", "Tokens whose scores were cached or in flight", "how")
        self._out_of_memory = self._counter("out_of_memory", "Batches that were split because they did not fit")
        self._non_finite = self._counter("non_finite", "Items withheld because a number was not finite", "model")
        self._loads = self._counter("loads", "Pairs loaded over HTTP", "outcome")
        self._rewards: dict[str, RunningStats] = {}
        self._reward_mean = self._gauge("reward_mean_nats", "Mean of the latest rewards", "model")
        self._reward_std = self._gauge("reward_std_nats", "Standard deviation of the latest rewards", "model")
        self._reward_negative = self._gauge("reward_negative_ratio", "Share below 0 of the latest rewards", "model")
        self._queue = self._gauge("queue_tokens", "Tokens admitted and not yet answered")
        self._rate = self._gauge("device_tokens_per_second", "Tokens per second of the latest batches")
        self._memory = self._gauge("device_memory_bytes", "Memory that the models and their batches hold", "device")
        self._pairs = self._gauge("pair_info", "1 for each served pair", "model", "revision")
        self._results = self._gauge("results_bytes", "Memory of the cached scores (--results-bytes)")
        self._ready = self._gauge("ready", "1 while the service can score")

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def scored(self, model: str, rewards: RunningStats) -> None:
        """Count the rewards of one answer."""
        self._scored.labels(model).inc(rewards.count)
        if rewards.count:
            before = self._rewards.get(model, RunningStats())
            self._rewards[model] = before.faded(math.exp(-rewards.count / WINDOW_TOKENS)) + rewards

    def stage(self, name: str, seconds: float) -> None:
        self._stages.labels(name).observe(seconds)

    def batch(self, *, tokens: int, shared_tokens: int, fill: float, seconds: float) -> None:
        self._batch_tokens.observe(tokens)
        self._batch_fill.observe(fill)
        self._batch_seconds.observe(seconds)
        self._computed.inc(tokens)
        self._shared.inc(shared_tokens)

    def reused(self, how: str, tokens: int) -> None:
        self._reused.labels(how).inc(tokens)

    def out_of_memory(self) -> None:
        self._out_of_memory.inc()

    def non_finite(self, model: str, items: int) -> None:
        self._non_finite.labels(model).inc(items)

    def load(self, outcome: str) -> None:
        self._loads.labels(outcome).inc()

    def render(self, snapshot: MetricsSnapshot) -> bytes:
        """All metrics in Prometheus' text format."""
        self._queue.set(snapshot.queue_tokens)
        self._rate.set(snapshot.tokens_per_s)
        self._results.set(snapshot.results_bytes)
        self._ready.set(snapshot.ready)
        # Remove the last values of pairs that are no longer served.
        for gauge in (self._pairs, self._reward_mean, self._reward_std, self._reward_negative):
            gauge.clear()
        for model, revision in snapshot.revisions.items():
            self._pairs.labels(model, revision).set(1)
            if model in self._rewards:
                self._reward_mean.labels(model).set(self._rewards[model].mean)
                self._reward_std.labels(model).set(self._rewards[model].std)
                self._reward_negative.labels(model).set(self._rewards[model].negative_ratio)
        for device, used_bytes in snapshot.memory_bytes.items():
            self._memory.labels(device).set(used_bytes)
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dense_reward_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dense_reward_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"dense_reward_{name}", text, labels, buckets=buckets, registry=self._registry)
