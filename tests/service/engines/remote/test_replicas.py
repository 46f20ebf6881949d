"""Replicas of a model on servers: identified, verified, balanced, excluded while they are unavailable, readmitted."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import model_server
import pytest
from dense_reward.engines.remote import load, replicas
from dense_reward.engines.remote.dialects import VllmCompletions
from model_server import Fault, Handler, ModelServer
from remote_service import IDS, hold, servers, serving
from running_service import Served, wait_until
from served_pair import environment, free_port, write_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _short_intervals() -> Iterator[None]:
    """Health checks are frequent. Periodic verification is off: it would use up the faults that tests inject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "RETRY_START_EVERY_S", 0.05)
        patch.setattr(replicas, "HEALTH_CHECK_EVERY_S", 0.05)
        patch.setattr(replicas, "VERIFY_EVERY_S", 3600.0)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture
def _unclosed_sockets() -> Iterator[None]:
    """Closes the client's sockets that a stopped server leaves to the garbage collector, which warns of each."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.unfreeze()  # loading a pair freezes what exists then, these sockets too
        gc.collect()


Cluster = tuple[Served, list[ModelServer]]
"""A service, and the servers of its sft model, which tests may break."""


@pytest.fixture(scope="module")
def shared_single(pair: Path) -> Iterator[Cluster]:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        yield running, [sft]


@pytest.fixture(scope="module")
def shared_double(pair: Path) -> Iterator[Cluster]:
    with (
        servers(pair, "sft", "sft", "reference") as (one, other, reference),
        serving(pair, f"{one.url}, {other.url}", reference.url) as running,
    ):
        yield running, [one, other]


@contextmanager
def repaired(cluster: Cluster) -> Iterator[Cluster]:
    """Leaves the servers healthy, and their service ready, to the next test."""
    running, sft_servers = cluster
    yield cluster
    for server in sft_servers:
        server.faults.clear()
        server.healthy = True
        health_checks = server.health_checks
        wait_until(lambda server=server, seen=health_checks: server.health_checks > seen + 2)  # type: ignore[misc]
    wait_until(lambda: is_ready(running))
    assert running.score(IDS).status_code == 200


@pytest.fixture
def single(shared_single: Cluster) -> Iterator[Cluster]:
    """A service over one server of each model."""
    with repaired(shared_single) as cluster:
        yield cluster


@pytest.fixture
def double(shared_double: Cluster) -> Iterator[Cluster]:
    """A service over two servers of the sft model."""
    with repaired(shared_double) as cluster:
        for server in cluster[1]:
            server.requests.clear()
        yield cluster


def is_ready(running: Served) -> bool:
    return running.client.get("/ready").status_code == 200


def progress(running: Served) -> str:
    return str(running.client.get("/ready").json()["progress"])


def refusal(running: Served) -> tuple[int, str]:
    """Status and code of the answer to a request that fails."""
    answer = running.score(IDS)
    return answer.status_code, answer.json()["error"]["code"]


def status(code: int) -> Fault:
    return lambda handler: handler.send(code, {"error": {"message": "an injected fault"}})


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def test_replicas_share_the_work_and_equal_prompts_go_to_one_of_them(double: Cluster) -> None:
    running, (one, other) = double
    for first in range(16):
        for _ in range(2):
            assert running.score(IDS | {"prompt_ids": [first, 6]}).status_code == 200
    prompts = [{tuple(body["prompt"][:2]) for _, body in server.requests} for server in (one, other)]
    assert all(len(seen) > 2 for seen in prompts), "one has all the work"
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("fault", [status(429), status(500), status(503), hang_up], ids=["429", "500", "503", "none"])
def test_a_server_that_fails_once_is_asked_again(single: Cluster, fault: Fault) -> None:
    running, (sft,) = single
    expected = running.score(IDS).json()["results"]
    sft.faults.append(fault)
    assert running.score(IDS).json()["results"] == expected
    assert not sft.faults


def test_a_server_that_keeps_failing_is_reported_as_unavailable_and_named_in_the_log_only(
    single: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    running, (sft,) = single
    sft.faults += [status(503)] * 20
    answer = running.score(IDS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert float(answer.headers["Retry-After"]) >= 1
    assert sft.url not in answer.text
    assert f"no log-probs: {sft.url} answered 503" in caplog.text
    sft.faults.clear()
    assert running.score(IDS).status_code == 200


def test_an_answer_without_the_log_probs_never_becomes_a_reward(single: Cluster) -> None:
    running, (sft,) = single
    sft.faults += [lambda handler: handler.send(200, {"choices": [{"prompt_logprobs": [None]}]})] * 20
    assert refusal(running) == (500, "internal")
    sft.faults.clear()
    assert running.score(IDS).status_code == 200


def test_a_server_that_is_not_healthy_is_excluded_and_readmitted(single: Cluster) -> None:
    running, (sft,) = single
    expected = running.score(IDS).json()["results"]
    sft.healthy = False
    wait_until(lambda: not is_ready(running))
    assert running.client.get("/ready").json()["state"] == "unavailable"
    assert re.search(rf"{re.escape(sft.url)} is not healthy: \d+ health checks failed in a row", progress(running))
    assert refusal(running) == (503, "engine_unavailable")
    assert sft.url not in running.score(IDS).text
    assert running.client.get("/health").status_code == 200
    sft.healthy = True
    wait_until(lambda: is_ready(running))
    assert running.score(IDS).json()["results"] == expected


def test_a_health_check_that_takes_too_long_counts_as_failed(single: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    running, (sft,) = single
    sft.health_delay_s = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(VllmCompletions, "health_timeout_s", 0.1)
        wait_until(lambda: not is_ready(running))
    sft.health_delay_s = 0.0
    wait_until(lambda: is_ready(running))


def test_another_replica_is_asked_what_one_failed_at(double: Cluster) -> None:
    running, (one, other) = double
    one.faults += [status(503)] * 20
    other.faults += [status(503)] * 20
    assert running.score(IDS).status_code == 503
    assert one.requests
    assert other.requests


def test_a_query_that_always_breaks_a_healthy_server_fails_alone(single: Cluster) -> None:
    running, (sft,) = single
    sft.faults += [status(500)] * 20
    assert refusal(running) == (500, "internal")
    sft.faults.clear()
    assert running.score(IDS).status_code == 200


def test_another_replica_answers_what_one_refuses(double: Cluster) -> None:
    running, sft_servers = double
    expected = running.score(IDS).json()["results"]
    for server in sft_servers:
        server.faults += [status(404)] * 2
        assert running.score(IDS).json()["results"] == expected
        server.faults.clear()


def test_one_of_two_replicas_is_enough(double: Cluster) -> None:
    running, (one, _) = double
    one.healthy = False
    health_checks = one.health_checks
    wait_until(lambda: one.health_checks > health_checks + 2)  # it is excluded then
    assert is_ready(running)
    one.requests.clear()
    answers = [running.score(IDS | {"prompt_ids": [first, 6]}) for first in range(8)]
    assert {answer.status_code for answer in answers} == {200}
    assert not one.requests


def test_a_query_fails_when_the_server_that_holds_it_is_excluded(single: Cluster) -> None:
    running, (sft,) = single
    expected = running.score(IDS).json()["results"]
    woken = Event()
    sft.faults += [lambda handler: hold(handler, woken)] * 2
    sft.healthy = False
    assert refusal(running) == (503, "engine_unavailable")
    woken.set()
    sft.faults.clear()
    sft.healthy = True
    wait_until(lambda: is_ready(running))
    assert running.score(IDS).json()["results"] == expected


def test_a_server_that_breaks_over_its_probe_is_excluded_although_its_health_checks_succeed(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "VERIFY_EVERY_S", 0.1)
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.faults += [status(500)] * 10_000
        wait_until(lambda: not is_ready(running))
        sft.faults.clear()
        wait_until(lambda: is_ready(running))


def test_a_server_whose_weights_change_while_it_runs_is_excluded(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "VERIFY_EVERY_S", 0.1)
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        right, sft.model = sft.model, reference.model
        wait_until(lambda: not is_ready(running))
        assert "another checkpoint" in progress(running)
        sft.model = right
        wait_until(lambda: is_ready(running))


def test_health_checks_get_through_while_queries_take_all_connections(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "MAX_CONNECTIONS", 2)
    woken = Event()
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.faults += [lambda handler: hold(handler, woken)] * 2
        caller = Thread(target=running.score, args=(IDS,))
        caller.start()
        wait_until(lambda: not sft.faults)
        health_checks = sft.health_checks
        wait_until(lambda: sft.health_checks > health_checks + 2)
        assert is_ready(running)
        woken.set()
        caller.join()


def drip(handler: Handler, until: Event) -> None:
    """An answer that goes on and never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not until.wait(0.3):
        handler.wfile.write(b" ")
    handler.close_connection = True


def test_sglang_can_take_longer_for_a_health_check_than_for_other_requests(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its health check generates a token, which waits for a running computation."""
    monkeypatch.setattr(replicas, "STATUS_TIMEOUT_S", 0.5)
    with (
        servers(pair, "sft", "reference", wire_format="sglang") as (sft, reference),
        serving(pair, sft.url, reference.url) as running,
    ):
        sft.health_delay_s = 0.7
        health_checks = sft.health_checks
        wait_until(lambda: sft.health_checks > health_checks + 2)
        assert is_ready(running)


def test_one_query_that_hangs_does_not_keep_the_device_for_ever(pair: Path) -> None:
    woken = Event()
    with (
        servers(pair, "sft", "reference") as (sft, reference),
        serving(pair, sft.url, reference.url, max_request_s="1") as running,
    ):
        sft.faults += [lambda handler: drip(handler, woken)] * 2
        assert refusal(running) == (504, "deadline_exceeded")
        wait_until(lambda: running.score(IDS).status_code == 200)
        woken.set()


@pytest.mark.usefixtures("_unclosed_sockets")
def test_a_server_that_comes_back_as_another_is_not_readmitted(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.stop()
        wait_until(lambda: not is_ready(running))
        with ModelServer(pair / "sft", port=sft.port, max_model_len=48):
            wait_until(lambda: "can do less" in progress(running))
        with ModelServer(pair / "reference", port=sft.port) as wrong:
            wait_until(lambda: "another checkpoint" in progress(running))
            assert running.score(IDS).status_code == 503
            assert wrong.requests
        with ModelServer(pair / "sft", port=sft.port):
            wait_until(lambda: is_ready(running))


@contextmanager
def server_processes(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a server for each line that it is sent: see model_server.main."""
    command = [sys.executable, model_server.__file__, str(folder), str(port), "vllm"]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process  # its stdin is closed then, and its last server with it


def start_server(processes: "subprocess.Popen[bytes]") -> int:
    """Its process id."""
    assert processes.stdin is not None
    assert processes.stdout is not None
    processes.stdin.write(b"\n")
    processes.stdin.flush()
    return int(processes.stdout.readline())


@pytest.mark.usefixtures("_unclosed_sockets")
def test_a_server_killed_under_load_costs_no_wrong_answer_and_the_service_resumes(pair: Path) -> None:
    """Real processes and a real SIGKILL: /ready reports it, and callers get Retry-After."""
    port = free_port()
    with (
        server_processes(pair / "sft", port) as processes,
        servers(pair, "reference") as (reference,),
        serving(pair, f"http://127.0.0.1:{port}", reference.url, ready=False) as running,
    ):
        server_id = start_server(processes)
        wait_until(lambda: is_ready(running), 60)
        expected = running.score(IDS).json()["results"]
        seen: list[int] = []
        over = Event()
        callers = [Thread(target=keep_requesting, args=(running, expected, seen, over)) for _ in range(4)]
        for caller in callers:
            caller.start()
        wait_until(lambda: seen.count(200) > 20)
        os.kill(server_id, signal.SIGKILL)
        wait_until(lambda: not is_ready(running))
        start_server(processes)
        wait_until(lambda: is_ready(running))
        answered = seen.count(200)
        wait_until(lambda: seen.count(200) > answered + 20)
        over.set()
        for caller in callers:
            caller.join()
        assert set(seen) == {200, 503}


def keep_requesting(running: Served, expected: object, seen: list[int], over: Event) -> None:
    """Collects statuses; 0 for a wrong answer, and for a refusal without Retry-After."""
    while not over.is_set():
        answer = running.score(IDS)
        right = (
            answer.json().get("results") == expected if answer.status_code == 200 else "Retry-After" in answer.headers
        )
        seen.append(answer.status_code if right else 0)
        time.sleep(0.01)
