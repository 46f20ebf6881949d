"""Servers that are found by a name: replicas that appear at it join, and those that leave it get no more queries.

The servers listen on addresses of the loopback network, on one port. The name is resolved by a table of the test.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from dense_reward.engines.remote import load, replicas
from dense_reward.engines.remote.addresses import server_urls
from model_server import Handler, ModelServer
from remote_service import IDS, servers, serving
from running_service import Served, wait_until
from served_pair import free_port, write_pair

pytestmark = pytest.mark.slow
NAME = "models.rl.svc.cluster.local"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NAME resolves to: nothing at first."""
    table: list[str] = []
    resolve = socket.getaddrinfo

    def resolved(host: Any, port: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401 - as socket.getaddrinfo
        if host != NAME:
            return resolve(host, port, *rest, **options)
        if not table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for address in table for found in resolve(address, port, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    for module, interval in ((load, "RETRY_START_EVERY_S"), (replicas, "HEALTH_CHECK_EVERY_S")):
        monkeypatch.setattr(module, interval, 0.05)
    monkeypatch.setattr(replicas, "RESOLVE_EVERY_S", 0.05)
    monkeypatch.setattr(replicas, "VERIFY_EVERY_S", 3600.0)
    return table


def queried(running: Served, server: ModelServer) -> bool:
    """Whether some of several prompts reach this server; all of them are answered."""
    server.requests.clear()
    assert {running.score(IDS | {"prompt_ids": [first, 6]}).status_code for first in range(8)} == {200}
    return any(body.get("prompt", [0])[1:2] == [6] for _, body in server.requests)


def test_replicas_join_and_leave_with_the_addresses_of_a_name(pair: Path, addresses: list[str]) -> None:
    port = free_port()
    at = [ModelServer(pair / "sft", host=f"127.0.0.{number}", port=port) for number in (2, 3)]
    url = f"dns+http://{NAME}:{port}"
    with (
        servers(pair, "reference") as (reference,),
        at[0],
        at[1],
        serving(pair, url, reference.url, ready=False) as running,
    ):
        wait_until(lambda: "waiting for a server" in running.client.get("/ready").json()["progress"])
        addresses.append("127.0.0.2")
        wait_until(lambda: running.client.get("/ready").status_code == 200)
        assert queried(running, at[0])
        assert not at[1].requests

        addresses.append("127.0.0.3")
        wait_until(lambda: queried(running, at[1]))

        addresses.remove("127.0.0.2")
        wait_until(lambda: not queried(running, at[0]))

        addresses.clear()  # the resolver's answer while no pod is ready: what is known stays
        checks = at[1].health_checks
        wait_until(lambda: at[1].health_checks > checks + 2)
        assert queried(running, at[1])


def test_a_replica_that_leaves_answers_the_queries_that_it_has(pair: Path, addresses: list[str]) -> None:
    port, entered, woken = free_port(), Event(), Event()
    addresses.append("127.0.0.2")
    with (
        servers(pair, "reference") as (reference,),
        ModelServer(pair / "sft", host="127.0.0.2", port=port) as one,
        ModelServer(pair / "sft", host="127.0.0.3", port=port) as other,
        serving(pair, f"dns+http://{NAME}:{port}", reference.url) as running,
        ThreadPoolExecutor(1) as caller,
    ):

        def late(handler: Handler) -> None:
            entered.set()
            woken.wait()
            handler.send(200, one.answer(handler.path, one.requests[-1][1]))

        one.faults += [late]
        answer = caller.submit(running.score, IDS | {"response_ids": [[8, 9, 10]]})  # one query
        assert entered.wait(60)
        addresses[:] = ["127.0.0.3"]
        wait_until(lambda: other.health_checks > 2)  # the same answer of the resolver removed the first one
        woken.set()
        assert answer.result(60).status_code == 200
        prompt = IDS["prompt_ids"]
        assert not any(body.get("prompt", [])[: len(prompt)] == prompt for _, body in other.requests)


def test_a_name_gives_each_server_once_and_only_of_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        v6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::2", port, 0, 0))
        v4 = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("10.0.0.3", "10.0.0.2")]
        return [v6] if host == "six" else [v6, *v4]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    found = asyncio.run(server_urls(["http://one:8000/", "dns+http://four:8000", "dns+http://six", "http://one:8000"]))
    assert found == ["http://one:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000", "http://[fd00::2]:80"]
