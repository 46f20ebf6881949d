"""Servers that compute a pair: found out, proven, shared among replicas, left out when they are away, taken back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import model_server
import pytest
from dense_reward.engines.remote import replicas
from model_server import Handler, ModelServer, Trick
from remote_service import IDS, hold, servers, serving
from running_service import Served, wait_until
from served_pair import environment, free_port, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


def status(code: int) -> Trick:
    return lambda handler: handler.send(code, {"error": {"message": "told to"}})


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def test_replicas_share_the_work_and_equal_prompts_go_to_one_of_them(pair: Path) -> None:
    with servers(pair, "sft", "sft", "reference") as (one, other, reference):
        with serving(pair, f"{one.url}, {other.url}", reference.url) as running:
            for server in (one, other):
                server.asked.clear()
            for first in range(16):
                for _ in range(2):
                    assert running.score(IDS | {"prompt_ids": [first, 6]}).status_code == 200
        prompts = [{tuple(body["prompt"][:2]) for _, body in server.asked} for server in (one, other)]
        assert all(len(asked) > 2 for asked in prompts), "one has all the work"
        assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("trick", [status(429), status(500), status(503), hang_up])
def test_a_server_that_fails_once_is_asked_again(pair: Path, trick: Trick) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        expected = running.score(IDS).json()["results"]
        sft.tricks.append(trick)
        assert running.score(IDS).json()["results"] == expected
        assert not sft.tricks


def test_a_server_that_keeps_failing_is_told_as_unavailable(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.tricks += [status(503)] * 20
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert float(answer.headers["Retry-After"]) >= 1
        sft.tricks.clear()
        assert running.score(IDS).status_code == 200


def test_a_server_that_answers_something_else_gets_nobody_a_reward(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.tricks += [lambda handler: handler.send(200, {"choices": [{"prompt_logprobs": [None]}]})] * 20
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        sft.tricks.clear()
        assert running.score(IDS).status_code == 200


def test_a_server_that_is_not_well_is_left_out_and_taken_back(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        expected = running.score(IDS).json()["results"]
        sft.healthy = False
        wait_until(lambda: running.client.get("/ready").status_code == 503)
        assert running.client.get("/ready").json()["state"] == "unavailable"
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert running.client.get("/health").status_code == 200
        sft.healthy = True
        wait_until(lambda: running.client.get("/ready").status_code == 200)
        assert running.score(IDS).json()["results"] == expected


def test_another_replica_is_asked_what_one_failed_at(pair: Path) -> None:
    with servers(pair, "sft", "sft", "reference") as (one, other, reference):
        with serving(pair, f"{one.url},{other.url}", reference.url) as running:
            one.asked.clear()
            other.asked.clear()
            one.tricks += [status(503)] * 20
            other.tricks += [status(503)] * 20
            assert running.score(IDS).status_code == 503
        assert one.asked
        assert other.asked


def test_a_query_that_a_server_always_breaks_over_is_nobody_elses_trouble(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.tricks += [status(500)] * 20
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        sft.tricks.clear()
        assert running.score(IDS).status_code == 200


def test_another_replica_answers_what_one_refuses(pair: Path) -> None:
    with (
        servers(pair, "sft", "sft", "reference") as (one, other, reference),
        serving(pair, f"{one.url},{other.url}", reference.url) as running,
    ):
        expected = running.score(IDS).json()["results"]
        for server in (one, other):
            server.tricks += [status(404)] * 2
            assert running.score(IDS).json()["results"] == expected
            server.tricks.clear()


def test_a_server_that_breaks_over_its_probe_is_left_out_though_it_says_that_it_is_well(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PROVE_EVERY_S", 0.2)
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.tricks += [status(500)] * 10_000
        wait_until(lambda: running.client.get("/ready").status_code == 503)
        sft.tricks.clear()
        wait_until(lambda: running.client.get("/ready").status_code == 200)


def test_a_server_whose_queries_take_all_connections_is_still_seen_to_be_well(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "CONNECTIONS", 2)
    woken = Event()
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.tricks += [lambda handler: hold(handler, woken)] * 2
        asking = Thread(target=running.score, args=(IDS,))
        asking.start()
        wait_until(lambda: not sft.tricks)
        looks = sft.looks
        wait_until(lambda: sft.looks > looks + 2)
        assert running.client.get("/ready").status_code == 200
        woken.set()
        asking.join()


def drip(handler: Handler, until: Event) -> None:
    """An answer that goes on and never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not until.wait(0.3):
        handler.wfile.write(b" ")
    handler.close_connection = True


def test_sglang_may_take_its_time_to_say_that_it_is_well(pair: Path) -> None:
    """It generates a token for it, which waits for what is being computed."""
    with (
        servers(pair, "sft", "reference", speech="sglang") as (sft, reference),
        serving(pair, sft.url, reference.url) as running,
    ):
        sft.health_s = 2.5
        looks = sft.looks
        wait_until(lambda: sft.looks > looks + 2)
        assert running.client.get("/ready").status_code == 200


def test_a_server_whose_weights_change_while_it_runs_is_left_out(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PROVE_EVERY_S", 0.2)
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        right, sft.model = sft.model, reference.model
        wait_until(lambda: running.client.get("/ready").status_code == 503)
        assert "another checkpoint" in running.client.get("/ready").json()["progress"]
        sft.model = right
        wait_until(lambda: running.client.get("/ready").status_code == 200)


def test_one_query_that_hangs_does_not_keep_the_device_for_ever(pair: Path) -> None:
    woken = Event()
    with (
        servers(pair, "sft", "reference") as (sft, reference),
        serving(pair, sft.url, reference.url, max_request_s="1") as running,
    ):
        sft.tricks += [lambda handler: drip(handler, woken)] * 2
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        wait_until(lambda: running.score(IDS).status_code == 200)
        woken.set()


def test_nobody_waits_for_a_server_that_hangs(pair: Path) -> None:
    woken = Event()
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        expected = running.score(IDS).json()["results"]
        sft.tricks += [lambda _: wait(woken)] * 2
        sft.healthy = False
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        woken.set()
        sft.tricks.clear()
        sft.healthy = True
        wait_until(lambda: running.client.get("/ready").status_code == 200)
        assert running.score(IDS).json()["results"] == expected


def wait(event: Event) -> None:
    event.wait()


def test_one_of_two_replicas_is_enough(pair: Path) -> None:
    with (
        servers(pair, "sft", "sft", "reference") as (one, other, reference),
        serving(pair, f"{one.url},{other.url}", reference.url) as running,
    ):
        one.healthy = False
        looks = one.looks
        wait_until(lambda: one.looks > looks + 2)  # it is left out
        assert running.client.get("/ready").status_code == 200
        one.asked.clear()
        answers = [running.score(IDS | {"prompt_ids": [first, 6]}) for first in range(8)]
        assert {answer.status_code for answer in answers} == {200}
        assert not one.asked


def test_a_server_that_comes_back_able_to_do_less_is_not_taken_back(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.stop()
        wait_until(lambda: running.client.get("/ready").status_code == 503)
        with ModelServer(pair / "sft", port=sft.port, max_model_len=48):
            wait_until(lambda: "can do less" in running.client.get("/ready").json()["progress"])


def test_a_server_that_comes_back_with_another_checkpoint_is_not_taken_back(pair: Path) -> None:
    with servers(pair, "sft", "reference") as (sft, reference), serving(pair, sft.url, reference.url) as running:
        sft.stop()
        wait_until(lambda: running.client.get("/ready").status_code == 503)
        with ModelServer(pair / "reference", port=sft.port) as wrong:
            wait_until(lambda: "another checkpoint" in running.client.get("/ready").json()["progress"])
            assert running.score(IDS).status_code == 503
            assert wrong.asked
        with ModelServer(pair / "sft", port=sft.port):
            wait_until(lambda: running.client.get("/ready").status_code == 200)


def test_a_server_killed_under_load_costs_no_wrong_answer_and_the_service_resumes(pair: Path) -> None:
    """Real processes and a real SIGKILL: /ready says so within 5 seconds, callers are told to come back."""
    port = free_port()

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, model_server.__file__, str(pair / "sft"), str(port), "vllm"]
        return subprocess.Popen(command, env=environment())

    process = start()
    try:
        with (
            servers(pair, "reference") as (reference,),
            serving(pair, f"http://127.0.0.1:{port}", reference.url) as running,
        ):
            expected = running.score(IDS).json()["results"]
            seen: list[int] = []
            over = Event()
            callers = [Thread(target=keep_asking, args=(running, expected, seen, over)) for _ in range(4)]
            for caller in callers:
                caller.start()
            wait_until(lambda: seen.count(200) > 20)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            before = time.monotonic()
            wait_until(lambda: running.client.get("/ready").status_code == 503)
            assert time.monotonic() - before < 5
            process = start()
            wait_until(lambda: running.client.get("/ready").status_code == 200)
            answered = seen.count(200)
            wait_until(lambda: seen.count(200) > answered + 20)
            over.set()
            for caller in callers:
                caller.join()
            assert set(seen) == {200, 503}
    finally:
        process.kill()
        process.wait()


def keep_asking(running: Served, expected: object, seen: list[int], over: Event) -> None:
    """Statuses; 0 for an answer that is wrong, or a refusal that does not say when to come back."""
    while not over.is_set():
        answer = running.score(IDS)
        right = (
            answer.json().get("results") == expected if answer.status_code == 200 else "Retry-After" in answer.headers
        )
        seen.append(answer.status_code if right else 0)
        time.sleep(0.01)
