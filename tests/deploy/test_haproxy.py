"""A real haproxy with the shipped configuration in front of live services: which replica gets which request."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from dense_reward_trainer.runs.local_service import HOST, free_port
from name_server import name_server
from running_service import wait_until

ROOT = Path(__file__).resolve().parents[2]
from bench.rolling import CONFIGURATION, configured, free_ports  # noqa: E402

PATIENCE_S = 60.0
BODY = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]]}
ANSWERED = re.compile(r'^dense_reward_requests_total\{route="/score",status="200"\} (\S+)$', re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


@contextmanager
def proxy(folder: Path, ports: list[int]) -> Iterator[httpx2.Client]:
    port = free_port()
    (folder / "haproxy.cfg").write_text(configured((ROOT / CONFIGURATION).read_text("utf-8"), port, ports))
    command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    client = httpx2.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE_S, trust_env=False)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process, client:
        try:
            wait_until(lambda: listens(port), PATIENCE_S)
            yield client
        finally:
            process.kill()


def listens(port: int, host: str = HOST) -> bool:
    try:
        return bool(httpx2.get(f"http://{host}:{port}/metrics", timeout=PATIENCE_S, trust_env=False).status_code)
    except httpx2.TransportError:
        return False


def answered(port: int) -> int:
    """Number of requests that one replica has scored so far."""
    return answered_at(HOST, port)


def answered_at(host: str, port: int) -> int:
    found = ANSWERED.search(httpx2.get(f"http://{host}:{port}/metrics", timeout=PATIENCE_S, trust_env=False).text)
    return 0 if found is None else int(float(found[1]))


@pytest.fixture(scope="module")
def ports() -> list[int]:
    return free_ports(2)


@pytest.fixture(scope="module")
def in_front(tmp_path_factory: pytest.TempPathFactory, ports: list[int]) -> Iterator[httpx2.Client]:
    """A client of the proxy, once both replicas are up in both of its backends."""
    with ExitStack() as stack:
        for port in ports:
            command = [sys.executable, "-m", "dense_reward.cli", "serve", "--engine", "fake", "--port", str(port)]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
        wait_until(lambda: all(map(listens, ports)), PATIENCE_S)
        client = stack.enter_context(proxy(tmp_path_factory.mktemp("haproxy"), ports))
        wait_until(lambda: client.get("/ready").is_success, PATIENCE_S)
        wait_until(lambda: all(shares(client, ports, {}, 4)), PATIENCE_S)
        wait_until(lambda: all(map(sum, zip(*by_name(client, ports, 12), strict=True))), PATIENCE_S)
        yield client


def by_name(client: httpx2.Client, ports: list[int], names: int) -> list[list[int]]:
    """For each of `names` prompts, how many of its three requests each replica answered."""
    return [shares(client, ports, {"X-Prompt": f"prompt {number}"}, 3) for number in range(names)]


def shares(client: httpx2.Client, ports: list[int], headers: dict[str, str], count: int) -> list[int]:
    """How many of `count` requests each replica answered."""
    before = [answered(port) for port in ports]
    for _ in range(count):
        assert client.post("/score", json=BODY, headers=headers).is_success
    return [answered(port) - had for port, had in zip(ports, before, strict=True)]


def test_requests_without_a_prompts_name_are_spread(in_front: httpx2.Client, ports: list[int]) -> None:
    assert sorted(shares(in_front, ports, {}, 10)) == [5, 5]


def test_equal_names_of_prompts_meet_at_one_replica_and_all_names_do_not(
    in_front: httpx2.Client, ports: list[int]
) -> None:
    found = by_name(in_front, ports, 12)
    assert all(sorted(share) == [0, 3] for share in found)
    assert len({tuple(share) for share in found}) == 2


KUBERNETES = {"REPLICAS": "rewards-dense-reward-replicas.rl.svc.cluster.local:8000", "SERVER_S": "70"}


@pytest.mark.parametrize("variables", [{}, *({"MAX_REPLICAS": count, **KUBERNETES} for count in "128")], ids=str)
def test_haproxy_takes_the_file_as_compose_and_the_chart_set_it(variables: dict[str, str]) -> None:
    subprocess.run(["haproxy", "-c", "-f", str(ROOT / CONFIGURATION)], check=True, env=os.environ | variables)


@pytest.mark.slow
def test_replicas_are_those_of_a_name_that_a_resolver_knows(tmp_path: Path) -> None:
    """As in Compose and Kubernetes: haproxy asks a name server, and follows what it answers."""
    text, port, replicas = (ROOT / CONFIGURATION).read_text("utf-8"), free_port(), free_port()
    addresses = ["127.0.0.2"]
    commands = [serving_at(address, replicas) for address in ("127.0.0.2", "127.0.0.3")]
    with ExitStack() as stack:
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
        server = stack.enter_context(name_server(addresses))
        text = text.replace("    parse-resolv-conf\n", f"    nameserver tests {HOST}:{server}\n")
        (tmp_path / "haproxy.cfg").write_text(text.replace("bind :8000", f"bind {HOST}:{port}"))
        variables = os.environ | {"REPLICAS": f"replica.test:{replicas}", "MAX_REPLICAS": "4"}
        running = ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]
        process = stack.enter_context(
            subprocess.Popen(running, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables)
        )
        stack.callback(process.kill)
        client = stack.enter_context(
            httpx2.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE_S, trust_env=False)
        )
        wait_until(lambda: listens(port) and client.get("/ready").is_success, PATIENCE_S)
        assert client.get("/proxy").is_success
        assert answered_at("127.0.0.3", replicas) == 0
        addresses.append("127.0.0.3")
        wait_until(lambda: all_scored(client) and answered_at("127.0.0.3", replicas) > 0, PATIENCE_S)
        addresses.remove("127.0.0.2")

        def only_the_second_is_asked() -> bool:
            before = answered_at("127.0.0.2", replicas)
            return all_scored(client) and answered_at("127.0.0.2", replicas) == before

        wait_until(only_the_second_is_asked, PATIENCE_S)


def all_scored(client: httpx2.Client) -> bool:
    return all(client.post("/score", json=BODY).is_success for _ in range(4))


def serving_at(address: str, port: int) -> list[str]:
    fake = ["serve", "--engine", "fake", "--host", address, "--port", str(port)]
    return [sys.executable, "-m", "dense_reward.cli", *fake]


@pytest.mark.parametrize("path", ["/metrics", "/admin/models"])
def test_what_is_of_one_replica_is_not_passed_on(in_front: httpx2.Client, path: str) -> None:
    assert in_front.get(path).status_code == httpx2.codes.NOT_FOUND


def test_where_no_replica_is_up_callers_are_told_when_to_come_again(tmp_path: Path) -> None:
    with proxy(tmp_path, [free_port()]) as client:
        wait_until(lambda: client.get("/ready").status_code == httpx2.codes.SERVICE_UNAVAILABLE, PATIENCE_S)
        answer = client.post("/score", json=BODY)
    assert answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE
    assert answer.headers["Retry-After"] == "2"
    assert answer.json()["error"] == {"code": "starting", "message": "no replica is ready"}
