"""What Prometheus reads."""

from dense_reward.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families


def samples_of(metrics: Metrics, *, queue_tokens: int = 0, ready: bool = False) -> dict[tuple[str, ...], float]:
    """Value by name and labels."""
    text = metrics.render(queue_tokens=queue_tokens, ready=ready).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 422):
        metrics.request("/score", status)
    samples = samples_of(metrics)
    assert samples["dense_reward_requests_total", "/score", "200"] == 2
    assert samples["dense_reward_requests_total", "/score", "422"] == 1


def test_tokens_stages_and_batches_are_summed() -> None:
    metrics = Metrics()
    metrics.scored(7)
    metrics.scored(5)
    metrics.stage("encode", 0.25)
    metrics.batch(100, 0.5)
    metrics.batch(300, 0.25)
    samples = samples_of(metrics)
    assert samples["dense_reward_scored_tokens_total",] == 12
    assert samples["dense_reward_stage_seconds_sum", "encode"] == 0.25
    assert samples["dense_reward_batch_tokens_sum",] == 400
    assert samples["dense_reward_batch_seconds_sum",] == 0.75
    assert samples["dense_reward_batch_seconds_count",] == 2


def test_the_state_is_that_of_the_moment_of_asking() -> None:
    metrics = Metrics()
    assert samples_of(metrics, queue_tokens=9, ready=True)["dense_reward_ready",] == 1
    samples = samples_of(metrics, queue_tokens=3, ready=False)
    assert (samples["dense_reward_queue_tokens",], samples["dense_reward_ready",]) == (3, 0)


def test_two_services_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.request("/score", 200)
    assert ("dense_reward_requests_total", "/score", "200") not in samples_of(second)
