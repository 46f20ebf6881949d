"""Waits, queue, drain and grace are chosen together (waits.py), and no file says another number.

With the defaults, bursts of several jobs lose no step.
"""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dense_reward import AsyncClient, Backoff, Client
from dense_reward.client.http import Failure, Patience
from dense_reward.settings import Settings
from dense_reward.waits import (
    CLIENT_RETRY_FOR_S,
    CLIENT_TIMEOUT_S,
    DRAIN_S,
    KILL_S,
    MAX_QUEUE_TOKENS,
    MAX_REQUEST_S,
    PROXY_S,
    START_S,
)
from dense_reward_trainer.configs.service import ServiceOptions

from bench.scale.questions import BURSTS, Setup, simulate
from bench.scale.replica import Machine

ROOT = Path(__file__).parents[2]
SETTINGS = Settings.model_validate({})
GPU_TOKENS_PER_S = 6600
"""The GPU that docs/scale.md assumes."""
ANSWER_OF_HEALTH_S = 0.1
"""/health answers within this time, whatever else a service does."""


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def test_the_service_both_clients_and_all_jobs_have_these_defaults() -> None:
    for client in (Client, AsyncClient):
        parameters = inspect.signature(client).parameters
        waits = (parameters["timeout_s"].default, parameters["retry_for_s"].default)
        assert waits == (CLIENT_TIMEOUT_S, CLIENT_RETRY_FOR_S)
    of_jobs = ServiceOptions.model_fields
    assert of_jobs["service_timeout_s"].default == CLIENT_TIMEOUT_S
    assert of_jobs["service_patience_s"].default == CLIENT_RETRY_FOR_S
    assert (SETTINGS.max_request_s, SETTINGS.max_queue_tokens) == (MAX_REQUEST_S, MAX_QUEUE_TOKENS)
    assert SETTINGS.drain_s == DRAIN_S
    assert (BURSTS.timeout_s, BURSTS.retry_for_s) == (CLIENT_TIMEOUT_S, CLIENT_RETRY_FOR_S)


def test_whoever_waits_for_another_outlasts_it() -> None:
    assert MAX_REQUEST_S < PROXY_S < CLIENT_TIMEOUT_S
    assert MAX_QUEUE_TOKENS / GPU_TOKENS_PER_S < DRAIN_S
    assert DRAIN_S + START_S < CLIENT_RETRY_FOR_S


def test_a_request_whose_replica_dies_at_its_last_second_finds_the_next_one() -> None:
    """As in a replica without a second one: it is killed, and its successor loads the models."""
    patience, now_s = Patience(Backoff(), CLIENT_RETRY_FOR_S, started_s=0.0), MAX_REQUEST_S
    while now_s < MAX_REQUEST_S + START_S:
        now_s += patience.delay_s(Failure(ConnectionError("refused")), now_s, jitter=1.0)


def test_the_proxy_gives_up_after_the_service_and_before_the_client() -> None:
    (server_s,) = re.findall(r"timeout server \"\$\{SERVER_S-(\d+)\}s\"", text("docker/haproxy/haproxy.cfg"))
    assert int(server_s) == PROXY_S
    assert f'proxy-read-timeout: "{PROXY_S:.0f}"' in text("helm/dense-reward/values.yaml")


def test_what_stops_a_service_gives_it_the_time_to_drain() -> None:
    assert yaml.safe_load(text("helm/dense-reward/values.yaml"))["settings"]["drain_s"] == DRAIN_S
    grace = "terminationGracePeriodSeconds: {{ add (int $v.preStopSeconds) (int $v.settings.drain_s) %d }}"
    assert grace % KILL_S in text("helm/dense-reward/templates/deployment.yaml")
    compose = text("docker/compose.yaml")
    assert f'DENSE_REWARD_DRAIN_S: "${{DRAIN_S:-{DRAIN_S}}}"' in compose
    assert f"stop_grace_period: ${{DRAIN_S:-{DRAIN_S}}}s{1000 * KILL_S}ms" in compose
    assert f"terminationGracePeriodSeconds: {DRAIN_S + KILL_S} " in text("examples/kserve.yaml")
    assert f"--signal=TERM@{DRAIN_S + 3 * KILL_S}" in text("examples/slurm.sh")
    (of_ray,) = re.findall(r"graceful_shutdown_timeout_s\": (\d+)", text("examples/ray_serve.py"))
    assert int(of_ray) > DRAIN_S + KILL_S


@pytest.mark.parametrize("path", ["helm/dense-reward/templates/deployment.yaml", "docker/compose.yaml"])
def test_no_probe_is_as_short_as_a_busy_service_may_take(path: str) -> None:
    seconds = re.findall(r"timeoutSeconds: (\d+)|\btimeout: (\d+)s", text(path))
    assert len(seconds) >= 3
    assert all(int(one or other) >= 10 * ANSWER_OF_HEALTH_S for one, other in seconds)


@pytest.mark.parametrize("bound_tokens", [4096, 65_536, MAX_QUEUE_TOKENS])
def test_bursts_of_four_jobs_lose_no_step_with_the_defaults(bound_tokens: int) -> None:
    machine = Machine(tokens_per_s=864.0, max_queue_tokens=bound_tokens)
    outcome = simulate(Setup(machine, 2, bursts=replace(BURSTS, steps=6)))
    assert outcome.tally.failed_steps == 0
    assert len(outcome.tally.step_s) == 4 * 6


def test_less_patience_loses_steps() -> None:
    impatient = replace(BURSTS, timeout_s=60.0, retry_for_s=120.0, steps=6)
    machine = Machine(tokens_per_s=864.0, max_queue_tokens=4096)
    assert simulate(Setup(machine, 2, bursts=impatient)).tally.failed_steps > 0
