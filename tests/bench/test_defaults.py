"""Patience, queue, drain and grace are chosen together: with the defaults, bursts of several jobs lose no step."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dense_reward import AsyncClient, Client
from dense_reward.client.http import RETRY_FOR_S, TIMEOUT_S
from dense_reward.settings import Settings
from dense_reward_trainer.configs.service import ServiceOptions

from bench.scale.questions import BURSTS, Setup, simulate
from bench.scale.replica import MAX_REQUEST_S, Machine

ROOT = Path(__file__).parents[2]
SETTINGS = Settings.model_validate({})
DEFAULTS = replace(BURSTS, timeout_s=TIMEOUT_S, retry_for_s=RETRY_FOR_S, steps=6)


def test_both_clients_and_all_jobs_have_these_defaults() -> None:
    for client in (Client, AsyncClient):
        parameters = inspect.signature(client).parameters
        assert (parameters["timeout_s"].default, parameters["retry_for_s"].default) == (TIMEOUT_S, RETRY_FOR_S)
    of_jobs = ServiceOptions.model_fields
    assert (of_jobs["service_timeout_s"].default, of_jobs["service_patience_s"].default) == (TIMEOUT_S, RETRY_FOR_S)


def test_a_client_does_not_hang_up_before_the_service_gives_up() -> None:
    assert SETTINGS.max_request_s == MAX_REQUEST_S
    assert SETTINGS.max_request_s <= TIMEOUT_S


def test_a_client_retries_for_longer_than_a_service_takes_to_drain_and_start() -> None:
    values = yaml.safe_load((ROOT / "helm/dense-reward/values.yaml").read_text("utf-8"))
    start_s = 240
    assert SETTINGS.drain_s + start_s <= RETRY_FOR_S
    assert values["settings"]["drain_s"] + start_s <= RETRY_FOR_S


def test_a_service_in_compose_is_killed_only_after_it_has_drained() -> None:
    compose = (ROOT / "docker/compose.yaml").read_text("utf-8")
    grace_s = [int(seconds) for seconds in re.findall(r"stop_grace_period: (\d+)s", compose)]
    assert grace_s[0] > SETTINGS.drain_s


@pytest.mark.parametrize("bound_tokens", [4096, 65_536, SETTINGS.max_queue_tokens])
def test_bursts_of_four_jobs_lose_no_step_with_the_defaults(bound_tokens: int) -> None:
    machine = Machine(tokens_per_s=864.0, max_queue_tokens=bound_tokens)
    outcome = simulate(Setup(machine, 2, bursts=DEFAULTS))
    assert outcome.tally.failed_steps == 0
    assert len(outcome.tally.step_s) == 4 * DEFAULTS.steps


def test_less_patience_loses_steps() -> None:
    impatient = replace(DEFAULTS, timeout_s=60.0, retry_for_s=120.0)
    machine = Machine(tokens_per_s=864.0, max_queue_tokens=4096)
    assert simulate(Setup(machine, 2, bursts=impatient)).tally.failed_steps > 0
