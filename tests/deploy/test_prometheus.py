"""A real Prometheus scrapes live services with the shipped configuration, and answers the queries that scale them."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from dense_reward_trainer.runs.local_service import HOST, free_port
from monitoring_files import ALERTS, DASHBOARD, GUIDE, METRIC
from running_service import wait_until

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "docker" / "prometheus" / "prometheus.yaml"
PATIENCE_S = 60.0
KEYS = {"scorer": "key-of-a-scorer-of-tests", "metrics": "key-of-a-scraper"}
NOT_BEFORE_IT_HAPPENS = {
    "dense_reward_device_memory_bytes",  # of a GPU
    "dense_reward_loads_total",
    "dense_reward_non_finite_total",
    "dense_reward_reused_tokens_total",
}
HELD_TOKENS = (1000, 500)
# The labels that a ServiceMonitor adds for the release that is rendered here.
LABELS = {"namespace": "rl", "service": "rewards-dense-reward"}
SUPPORT = ROOT / "tests" / "support"  # the folder of the module rendered_chart
# This Python has Helm, but not the packages that a service needs.
CHARTS_PYTHON = ROOT / ".venv-deploy" / "bin" / "python"
RENDER = (
    "import json, sys, rendered_chart; json.dump(rendered_chart.render(json.load(sys.stdin), sys.argv[1]), sys.stdout)"
)

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


@dataclass(frozen=True, slots=True)
class Live:
    """A client of Prometheus, and the ports of the services that it scrapes."""

    prometheus: httpx2.Client
    ports: list[int]

    def asked(self, query: str) -> list[dict[str, object]]:
        """The series that an instant query returns."""
        answer = self.prometheus.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        found: list[dict[str, object]] = answer["data"]["result"]
        return found

    def value(self, query: str) -> float | None:
        """Value of a query's only series, None if there is none."""
        found = self.asked(query)
        assert len(found) <= 1
        pair = found[0]["value"] if found else None
        return float(pair[1]) if isinstance(pair, list) else None


def adjusted(folder: Path, ports: list[int]) -> str:
    """The shipped configuration with these targets, labels and files, and a shorter interval."""
    text = SHIPPED.read_text("utf-8")
    static = {"targets": [f"{HOST}:{port}" for port in ports], "labels": LABELS}
    changes = {
        "dns_sd_configs:": "static_configs:",
        "{names: [replica], type: A, port: 8000, refresh_interval: 15s}": json.dumps(static),
        "/run/secrets/metrics_key": str(folder / "metrics_key"),
        "/etc/prometheus/alerts.yaml": str(ALERTS),
        "scrape_interval: 15s": "scrape_interval: 1s",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@contextmanager
def service(folder: Path, port: int) -> Iterator[None]:
    options = ["--engine", "fake", "--port", str(port), "--api-keys-file", str(folder / "keys.json")]
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *options, "--max-arrival-s", "600"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(f"http://{HOST}:{port}/ready"), PATIENCE_S)
            yield
        finally:
            process.kill()


@contextmanager
def prometheus(folder: Path, ports: list[int]) -> Iterator[Live]:
    (folder / "prometheus.yaml").write_text(adjusted(folder, ports))
    port = free_port()
    url = f"http://{HOST}:{port}"
    options = [f"--web.listen-address={HOST}:{port}", f"--storage.tsdb.path={folder / 'data'}"]
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", *options, "--log.level=error"]
    with (
        subprocess.Popen(command) as process,
        httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client,
    ):
        try:
            wait_until(lambda: answers(f"{url}/-/ready"), PATIENCE_S)
            yield Live(client, ports)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5.0, trust_env=False).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two services that have scored, and a Prometheus that has scraped both."""
    folder = tmp_path_factory.mktemp("prometheus")
    keys = [{"name": name, "key": key, "rights": ["score"]} for name, key in KEYS.items()]
    (folder / "keys.json").write_text(json.dumps(keys))
    (folder / "metrics_key").write_text(KEYS["metrics"] + "\n")
    ports = [free_port() for _ in HELD_TOKENS]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(service(folder, port))
            score(port)
        running = stack.enter_context(prometheus(folder, ports))
        wait_until(lambda: running.value("sum(dense_reward_ready)") == len(ports), PATIENCE_S)
        yield running


def score(port: int) -> None:
    body = {"prompt": "1+1=", "responses": ["2", "3"]}
    headers = {"Authorization": f"Bearer {KEYS['scorer']}"}
    answer = httpx2.post(f"http://{HOST}:{port}/score", json=body, headers=headers, timeout=PATIENCE_S, trust_env=False)
    answer.raise_for_status()


def test_the_documented_series_are_scraped(live: Live) -> None:
    documented = set(METRIC.findall(GUIDE)) - NOT_BEFORE_IT_HAPPENS
    names = {str(name) for name in live.prometheus.get("/api/v1/label/__name__/values").json()["data"]}
    missing = {name for name in documented if not names & {name, f"{name}_bucket"}}
    assert len(documented) > 15
    assert not missing
    assert live.value("sum(dense_reward_scored_tokens_total)") == 2 * 4  # two responses and their ends, twice
    assert live.value('count(up{job="dense-reward"} == 1)') == len(live.ports)


def test_the_queues_of_all_replicas_are_what_to_scale_by(live: Live) -> None:
    """A body that has arrived in part reserves its share of the queue, a token for every four bytes."""
    with waiting(live):
        wait_until(lambda: live.value("sum(dense_reward_queue_tokens)") == sum(HELD_TOKENS), PATIENCE_S)
        assert live.value("max(dense_reward_queue_tokens)") == max(HELD_TOKENS)
    wait_until(lambda: live.value("sum(dense_reward_queue_tokens)") == 0, PATIENCE_S)


@pytest.mark.skipif(not CHARTS_PYTHON.is_file(), reason="needs .venv-deploy: make test-deploy")
def test_the_query_that_the_chart_gives_to_keda_finds_the_queues_of_its_release_alone(live: Live) -> None:
    mine, other = keda_query("rewards"), keda_query("others")
    with waiting(live):
        wait_until(lambda: live.value(mine) == sum(HELD_TOKENS), PATIENCE_S)
        assert live.value(other) is None
    wait_until(lambda: live.value(mine) == 0, PATIENCE_S)


@contextmanager
def waiting(live: Live) -> Iterator[None]:
    """HELD_TOKENS tokens in the queues of the services, which must be empty before."""
    assert live.value("sum(dense_reward_queue_tokens)") == 0
    with ExitStack() as stack:
        for port, tokens in zip(live.ports, HELD_TOKENS, strict=True):
            caller = stack.enter_context(socket.create_connection((HOST, port)))
            caller.sendall(half_a_request(4 * tokens))
        yield


def keda_query(release: str) -> str:
    """The query for KEDA."""
    scaling = {"kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
    values = {"autoscaling": scaling, "serviceMonitor": {"enabled": True}}
    query: str = rendered(release, "ScaledObject", values)["spec"]["triggers"][0]["metadata"]["query"]
    return query


def rendered(release: str, kind: str, values: dict[str, object]) -> Any:  # noqa: ANN401 - YAML
    """An object of a release, as Helm's own code renders it."""
    command = [str(CHARTS_PYTHON), "-c", RENDER, release]
    done = subprocess.run(command, input=json.dumps(values), cwd=SUPPORT, check=True, capture_output=True, text=True)
    (found,) = (made for made in json.loads(done.stdout) if made["kind"] == kind)
    return found


@pytest.mark.skipif(not CHARTS_PYTHON.is_file(), reason="needs .venv-deploy: make test-deploy")
def test_a_release_that_is_gone_raises_its_alarm_beside_another_that_serves(live: Live) -> None:
    for release, is_down in (("rewards", False), ("others", True)):
        (group,) = rendered(release, "PrometheusRule", {"prometheusRule": {"enabled": True}})["spec"]["groups"]
        found = {rule["alert"]: live.asked(rule["expr"]) for rule in group["rules"]}
        assert bool(found["DenseRewardDown"]) == is_down
        assert not found["DenseRewardNotReady"]


def half_a_request(size: int) -> bytes:
    """A request whose body declares twice `size` bytes, of which only `size` are sent."""
    head = f"POST /score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS['scorer']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {2 * size}\r\n\r\n"
    return head.encode() + b" " * size


def test_the_alerts_are_loaded_and_every_query_that_is_shipped_can_be_asked(live: Live) -> None:
    (group,) = live.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"][0]["rules"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in rules]
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    drawn = [target["expr"] for panel in panels for target in panel["targets"]]
    for query in [rule["expr"] for rule in rules] + drawn:
        live.asked(re.sub(r"\$__\w+", "1m", query).replace("$instance", ".*"))


def test_a_scraper_without_the_key_is_refused(live: Live) -> None:
    answer = httpx2.get(f"http://{HOST}:{live.ports[0]}/metrics", timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == httpx2.codes.UNAUTHORIZED
