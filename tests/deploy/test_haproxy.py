"""A real haproxy with the shipped configuration in front of live services: which replica gets which request."""

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


def listens(port: int) -> bool:
    try:
        return bool(httpx2.get(f"http://{HOST}:{port}/metrics", timeout=PATIENCE_S, trust_env=False).status_code)
    except httpx2.TransportError:
        return False


def answered(port: int) -> int:
    """Number of requests that one replica has scored so far."""
    found = ANSWERED.search(httpx2.get(f"http://{HOST}:{port}/metrics", timeout=PATIENCE_S, trust_env=False).text)
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


def test_the_lines_for_kubernetes_are_taken_in_the_place_of_those_for_compose(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    resolvers, server = page.partition("```haproxy\n")[2].partition("```")[0].split("\n\n")
    text = (ROOT / CONFIGURATION).read_text("utf-8")
    text, sections = re.subn(r"^resolvers .*\n(    .*\n)+", f"{resolvers}\n", text, flags=re.MULTILINE)
    text, servers = re.subn(r"^    server-template .*\n", server, text, flags=re.MULTILINE)
    assert (sections, servers) == (1, 2)
    (tmp_path / "haproxy.cfg").write_text(text)
    subprocess.run(["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], check=True)


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
