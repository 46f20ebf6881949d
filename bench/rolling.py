"""Replicas replaced under load behind haproxy: `python -m bench.rolling` writes bench/results/rolling.json.

Two replicas of the real service, the proxy's shipped configuration, and callers that never retry: each request without
an answer has failed. Ten times a third replica is started, and once it is ready an old one gets SIGTERM. With
--as-the-chart the proxy does not retry either: a command takes the old replica out, as Kubernetes removes a pod from
the endpoints, and SIGTERM follows after the chart's preStop. Writes bench/results/rolling_chart.json.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import yaml
from dense_reward import AsyncClient, ClientError
from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.local_service import HOST, free_port
from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import circumstances
from bench.reliability.load import Json, Known, Outcome, ask, requests, with_answers
from bench.reliability.server import PATIENCE_S, Server, percentile
from bench.scale import page

RESULTS, RESULTS_OF_THE_CHART = Path("bench/results/rolling.json"), Path("bench/results/rolling_chart.json")
CONFIGURATION = Path("docker/haproxy/haproxy.cfg")
CHART_VALUES = Path("helm/dense-reward/values.yaml")
BACKENDS = ("least_busy", "by_prompt")
FOLDER = Path("runs/rolling")
"""Folder of the proxy's configuration and log."""
REPLACED, REPLICAS = 10, 2
CALLERS, LARGE_CALLERS = 8, 1
SEEN_S = 2.0
"""Seconds from the readiness of the new replica to the stop of the old one. The proxy checks twice per second."""
LARGE_RESPONSES, LARGE_TOKENS = 400, 60
"""Size of a request that exceeds the proxy's buffer: only a client can retry it, the proxy cannot."""


@dataclass(slots=True)
class Load:
    """Outcome of the requests through the proxy. `sent` counts those of callers that never retry."""

    outcome: Outcome = field(default_factory=Outcome)
    sent: int = 0
    large: Counter[str] = field(default_factory=Counter)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def failed(self) -> int:
        """Number of requests without an answer or with a wrong one."""
        return self.sent - self.outcome.statuses[200] + self.outcome.wrong + self.large["failed"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """Seconds from start to ready of the new replica; seconds from SIGTERM to exit, and exit code, of the old one."""

    ready_s: float
    drained_s: float
    exit_code: int


@dataclass(frozen=True, slots=True)
class Front:
    """The proxy in front of replicas on these ports; `control` is its command socket."""

    url: str
    ports: Sequence[int]
    control: Path

    def set_state(self, port: int, state: str) -> None:
        """Sets a replica to "ready" or "maint", in which it gets no new requests but finishes those that it has."""
        name = f"replica{self.ports.index(port)}"
        for backend in BACKENDS:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.control))
                connection.sendall(f"set server {backend}/{name} state {state}\n".encode())
                if error := connection.makefile().read().strip():
                    raise RuntimeError(f"haproxy refused to set {backend}/{name} to {state}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 if no request failed, 2 if haproxy is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    parser.add_argument(
        "--as-the-chart", action="store_true", help="no retries; a replica is taken out of the proxy before SIGTERM"
    )
    as_the_chart = parser.parse_args(arguments).as_the_chart
    if shutil.which("haproxy") is None:
        print("bench.rolling needs haproxy: install it (Debian: apt-get install haproxy)", file=sys.stderr)
        return 2
    train_pair()
    at = commit()  # read first: the results of this run make the checkout dirty
    ports = free_ports(REPLICAS + 1)
    leave_s = pre_stop_s() if as_the_chart else None
    with proxy(ports, retries=not as_the_chart) as front:
        load, replacements, seconds = asyncio.run(_rolled(front, leave_s))
    record = {**figures(load, replacements, seconds), **circumstances(), "commit": at, "haproxy": _version()}
    record |= {"retries": not as_the_chart, "pre_stop_s": leave_s}
    (RESULTS_OF_THE_CHART if as_the_chart else RESULTS).write_text(json.dumps(record, indent=2) + "\n")
    page.write()
    print(json.dumps(record, indent=2))
    return 0 if load.failed == 0 else 1


def free_ports(count: int) -> list[int]:
    """Returns distinct ports: the system can return a free port twice."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


def pre_stop_s() -> float:
    """Seconds between a pod's removal from the endpoints and its SIGTERM, in the chart."""
    return float(yaml.safe_load(CHART_VALUES.read_text("utf-8"))["preStopSeconds"])


def configured(text: str, port: int, replicas: Sequence[int], *, retries: bool = True) -> str:
    """Returns the shipped configuration with this port and the fixed addresses of these replicas, without resolvers.

    Raises ValueError if a line that must be replaced is missing.
    """
    servers = "\n".join(f"    server replica{number} {HOST}:{at}" for number, at in enumerate(replicas))
    changes = {
        r"^    bind :8000$": f"    bind {HOST}:{port}",
        r"^    server-template .*$": servers,
        r"^resolvers .*\n(    .*\n)+": "",
    }
    if not retries:
        changes |= {r"^    retries .*$": "    retries 0", r"^    (retry-on|option redispatch) .*\n": ""}
    for pattern, new in changes.items():
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count == 0:
            raise ValueError(f"{CONFIGURATION} has no line {pattern}")
    return text


@contextmanager
def proxy(replicas: Sequence[int], *, retries: bool = True) -> Iterator[Front]:
    """Runs haproxy in front of replicas on these ports. Does not wait until one of them is ready."""
    port = free_port()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has at most about 100 characters
        control, file = Path(short) / "control", FOLDER / "haproxy.cfg"
        text = configured(CONFIGURATION.read_text("utf-8"), port, replicas, retries=retries)
        file.write_text(text + f"\nglobal\n    stats socket {control} level admin\n")
        with (FOLDER / "haproxy.log").open("w") as log:
            process = subprocess.Popen(["haproxy", "-db", "-f", str(file)], stdout=log, stderr=log)
        try:
            yield Front(f"http://{HOST}:{port}", replicas, control)
        finally:
            process.kill()
            process.wait(PATIENCE_S)


async def _rolled(front: Front, leave_s: float | None) -> tuple[Load, list[Replacement], float]:
    """Replaces each replica in turn under load. Returns the load, the replacements and the seconds in total."""
    running = [_started(port) for port in front.ports[:REPLICAS]]
    free = front.ports[REPLICAS]
    load, replacements = Load(), []
    try:
        for server in running:
            await asyncio.to_thread(server.wait_until_ready)
        known = await with_answers(running[0], requests(100))
        await asyncio.sleep(SEEN_S)
        began_s = time.perf_counter()
        callers = [asyncio.create_task(_keep_asking(front.url, known, load, number)) for number in range(CALLERS)]
        callers += [asyncio.create_task(_keep_asking_large(front.url, load)) for _ in range(LARGE_CALLERS)]
        for _ in range(REPLACED):
            new, replacement = await _replaced(running[0], free, front, leave_s)
            free = _port(running[0])
            running = [*running[1:], new]
            replacements.append(replacement)
            print(f"{replacement}, failed so far: {load.failed}", file=sys.stderr, flush=True)
        load.over.set()
        await asyncio.gather(*callers)
        seconds = time.perf_counter() - began_s
    finally:
        for server in running:
            server.process.kill()
            server.process.wait(PATIENCE_S)
    load.outcome.check()
    return load, replacements, seconds


def _started(port: int) -> Server:
    """Starts a replica on all cores: on one core a replica that loads would starve the others."""
    server = Server.start(port=port)
    os.sched_setaffinity(server.process.pid, range(os.cpu_count() or 1))
    return server


def _port(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


async def _replaced(old: Server, port: int, front: Front, leave_s: float | None) -> tuple[Server, Replacement]:
    """Starts a new replica, waits until it is ready and the proxy must have noticed, and stops the old one.

    With `leave_s` the proxy first takes the old one out, and SIGTERM follows after that many seconds.
    """
    before_s = time.perf_counter()
    new = _started(port)
    await asyncio.to_thread(new.wait_until_ready)
    ready_s = time.perf_counter() - before_s
    if leave_s is not None:
        front.set_state(port, "ready")  # only now, because the proxy then assumes that it is up
    await asyncio.sleep(SEEN_S)
    if leave_s is not None:
        front.set_state(_port(old), "maint")
        await asyncio.sleep(leave_s)
    before_s = time.perf_counter()
    code = await asyncio.to_thread(old.stop)
    return new, Replacement(ready_s, time.perf_counter() - before_s, code)


async def _keep_asking(url: str, known: list[Known], load: Load, seed: int) -> None:
    draw = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        while not load.over.is_set():
            await ask(client, draw.choice(known), load.outcome)
            load.sent += 1


async def _keep_asking_large(url: str, load: Load) -> None:
    """Sends large requests with the project's own client, which retries."""
    draw = random.Random(0)
    async with AsyncClient(url) as client:
        while not load.over.is_set():
            ids = [[draw.randrange(256) for _ in range(LARGE_TOKENS)] for _ in range(LARGE_RESPONSES)]
            try:
                scored = await client.score_ids(ids[0][:10], ids)
            except (ClientError, httpx2.HTTPError) as error:
                load.large["failed"] += 1
                print(f"a large request failed: {error}", file=sys.stderr, flush=True)
            else:
                load.large["answered"] += len(scored.results) == LARGE_RESPONSES


def figures(load: Load, replacements: list[Replacement], seconds: float) -> Json:
    """Figures of the results file; docs/scale.md shows some of them."""
    codes = [one.exit_code for one in replacements]
    return {
        "rolling_failed": load.failed + sum(code != 0 for code in codes),
        "requests": load.sent,
        "unanswered": load.sent - sum(load.outcome.statuses.values()),
        **load.outcome.summary(),
        "large_requests": dict(load.large),
        "replaced": len(replacements),
        "exit_codes": codes,
        "seconds": seconds,
        "ready_s": [one.ready_s for one in replacements],
        "drained_s": [one.drained_s for one in replacements],
        "ready_p50_s": percentile([one.ready_s for one in replacements], 0.5),
    }


def _version() -> str:
    return subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout.split("\n", 1)[0]


if __name__ == "__main__":
    sys.exit(main())
