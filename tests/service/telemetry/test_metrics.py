"""The metrics that Prometheus reads."""

import numpy as np
import pytest
from dense_reward.telemetry.metrics import WINDOW_TOKENS, Metrics, MetricsSnapshot
from dense_reward.telemetry.running_stats import RunningStats
from prometheus_client.parser import text_string_to_metric_families

NOW = MetricsSnapshot(
    ready=True, queue_tokens=9, tokens_per_s=100.0, revisions={"half": "r1"}, memory_bytes={"cuda:0": 7}
)


def samples_of(metrics: Metrics, snapshot: MetricsSnapshot = NOW) -> dict[tuple[str, ...], float]:
    """Value by name and labels."""
    return {
        (sample.name.removeprefix("dense_reward_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render(snapshot).decode())
        for sample in family.samples
    }


def rewards(*values: float) -> RunningStats:
    return RunningStats.of([np.array(values, dtype=np.float32)])


def test_requests_are_counted_and_timed_by_route_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 422):
        metrics.request("/score", status, 0.5)
    samples = samples_of(metrics)
    assert samples["requests_total", "/score", "200"] == 2
    assert samples["requests_total", "/score", "422"] == 1
    assert samples["request_seconds_sum", "/score"] == 1.5


def test_stages_and_batches_are_summed() -> None:
    metrics = Metrics()
    metrics.stage("encode", 0.25)
    metrics.batch(tokens=100, shared_tokens=70, fill=0.25, seconds=0.5)
    metrics.batch(tokens=300, shared_tokens=0, fill=0.75, seconds=0.25)
    samples = samples_of(metrics)
    assert samples["stage_seconds_sum", "encode"] == 0.25
    assert samples["batch_tokens_sum",] == samples["computed_tokens_total",] == 400
    assert samples["shared_tokens_total",] == 70
    assert (samples["batch_fill_ratio_sum",], samples["batch_fill_ratio_count",]) == (1.0, 2)
    assert samples["batch_seconds_sum",] == 0.75


def test_failures_are_counted_by_what_failed() -> None:
    metrics = Metrics()
    metrics.out_of_memory()
    metrics.non_finite("half", 3)
    metrics.load("failed")
    samples = samples_of(metrics)
    assert samples["out_of_memory_total",] == 1
    assert samples["non_finite_total", "half"] == 3
    assert samples["loads_total", "failed"] == 1


def test_the_state_is_that_of_the_moment_of_asking() -> None:
    metrics = Metrics()
    samples = samples_of(metrics)
    assert (samples["ready",], samples["queue_tokens",], samples["device_tokens_per_second",]) == (1, 9, 100)
    assert (samples["pair_info", "half", "r1"], samples["device_memory_bytes", "cuda:0"]) == (1, 7)
    assert samples["process_resident_memory_bytes",] > 0
    later = MetricsSnapshot(ready=False, queue_tokens=0, tokens_per_s=0.0, revisions={"half": "r2"}, memory_bytes={})
    samples = samples_of(metrics, later)
    assert (samples["ready",], samples["queue_tokens",]) == (0, 0)
    assert ("pair_info", "half", "r1") not in samples


def test_rewards_are_told_by_pair_and_forgotten_with_it() -> None:
    metrics = Metrics()
    metrics.scored("half", rewards(1.0, -1.0, 3.0))
    metrics.scored("half", rewards())
    metrics.scored("gone", rewards(5.0))
    samples = samples_of(metrics)
    assert samples["scored_tokens_total", "half"] == 3
    assert samples["reward_mean_nats", "half"] == pytest.approx(1.0)
    assert samples["reward_std_nats", "half"] == pytest.approx(np.std([1.0, -1.0, 3.0]))
    assert samples["reward_negative_ratio", "half"] == pytest.approx(1 / 3)
    assert ("reward_mean_nats", "gone") not in samples


def test_the_latest_rewards_weigh_most() -> None:
    metrics = Metrics()
    metrics.scored("half", RunningStats.of([np.ones(WINDOW_TOKENS, dtype=np.float32)]))
    for _ in range(3):
        metrics.scored("half", RunningStats.of([np.full(WINDOW_TOKENS, -1.0, dtype=np.float32)]))
    samples = samples_of(metrics)
    assert -1.0 < samples["reward_mean_nats", "half"] < -0.9
    assert samples["reward_negative_ratio", "half"] > 0.95


def test_two_services_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.request("/score", 200, 0.1)
    assert ("requests_total", "/score", "200") not in samples_of(second)
