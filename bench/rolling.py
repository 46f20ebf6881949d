"""Replicas replaced under load behind haproxy: `python -m bench.rolling` writes bench/results/rolling.json.

Two replicas of the real service, the proxy's shipped configuration, and callers that never try again: whatever they
are not answered has failed. Ten times a third replica is started, and once it is ready an old one gets SIGTERM.
With --as-the-chart the proxy does not try again either: it is told which replica leaves, as Kubernetes tells its own,
and SIGTERM comes after the chart's preStop. That is written to bench/results/rolling_chart.json.
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

import httpx
import yaml
from dense_reward import AsyncClient, ClientError
from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.local_service import HOST, free_port
from dense_reward_trainer.runs.run_folder import commit

from bench.credit import circumstances
from bench.reliability.load import Json, Known, Outcome, ask, requests, with_answers
from bench.reliability.server import PATIENCE_S, Server, percentile

RESULTS, RESULTS_OF_THE_CHART = Path("bench/results/rolling.json"), Path("bench/results/rolling_chart.json")
CONFIGURATION = Path("docker/haproxy/haproxy.cfg")
CHART_VALUES = Path("helm/dense-reward/values.yaml")
BACKENDS = ("least_busy", "by_prompt")
FOLDER = Path("runs/rolling")
"""Keeps the proxy's configuration and log."""
REPLACED, REPLICAS = 10, 2
CALLERS, LARGE_CALLERS = 8, 1
SEEN_S = 2.0
"""From ready to the old one's signal: the proxy looks twice a second."""
LARGE_RESPONSES, LARGE_TOKENS = 400, 60
"""Of a request that is larger than the proxy's buffer: only a client that tries again can send it again."""


@dataclass(slots=True)
class Load:
    """What became of the requests through the proxy. `asked` counts those of callers that never try again."""

    outcome: Outcome = field(default_factory=Outcome)
    asked: int = 0
    large: Counter[str] = field(default_factory=Counter)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def failed(self) -> int:
        """Not answered, or wrongly."""
        return self.asked - self.outcome.statuses[200] + self.outcome.wrong + self.large["failed"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """Seconds from start to ready, and from SIGTERM to the end, of a replica; the exit code of the old one."""

    ready_s: float
    drained_s: float
    exit_code: int


@dataclass(frozen=True, slots=True)
class Front:
    """The proxy in front of replicas on these ports; `control` is the socket that it takes commands from."""

    url: str
    ports: Sequence[int]
    control: Path

    def tell(self, port: int, state: str) -> None:
        """Whether new requests go to a replica: "ready" or "maint". What it has inside goes on."""
        name = f"replica{self.ports.index(port)}"
        for backend in BACKENDS:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.control))
                connection.sendall(f"set server {backend}/{name} state {state}\n".encode())
                if said := connection.makefile().read().strip():
                    raise RuntimeError(f"haproxy: {said}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where no request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as-the-chart", action="store_true", help="no retries; a replica is taken out before SIGTERM")
    as_the_chart = parser.parse_args(arguments).as_the_chart
    if shutil.which("haproxy") is None:
        print("bench.rolling needs haproxy: install it (Debian: apt-get install haproxy)", file=sys.stderr)
        return 2
    train_pair()
    at = commit()  # before its own results change the checkout
    ports = free_ports(REPLICAS + 1)
    leave_s = pre_stop_s() if as_the_chart else None
    with proxy(ports, retries=not as_the_chart) as front:
        load, replacements, seconds = asyncio.run(_rolled(front, leave_s))
    told = {**figures(load, replacements, seconds), **circumstances(), "commit": at, "haproxy": _version()}
    told |= {"retries": not as_the_chart, "pre_stop_s": leave_s}
    (RESULTS_OF_THE_CHART if as_the_chart else RESULTS).write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))
    return 0 if load.failed == 0 else 1


def free_ports(count: int) -> list[int]:
    """All different: the system may name a port twice that nobody took in between."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


def pre_stop_s() -> float:
    """Seconds between the moment at which a pod of the chart is taken out and its SIGTERM."""
    return float(yaml.safe_load(CHART_VALUES.read_text("utf-8"))["preStopSeconds"])


def configured(text: str, port: int, replicas: Sequence[int], *, retries: bool = True) -> str:
    """The shipped configuration with this port and these replicas, which no name server is asked for.

    Raises ValueError where it has no place for them.
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
    """haproxy in front of replicas on these ports. It is not asked whether there are any yet."""
    port = free_port()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has a hundred characters at most
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
    """What became of the load while each replica in turn was replaced by one on the free port; and for how long."""
    serving_now = [_started(port) for port in front.ports[:REPLICAS]]
    free = front.ports[REPLICAS]
    load, replacements = Load(), []
    try:
        for server in serving_now:
            await asyncio.to_thread(server.wait_until_ready)
        asked = await with_answers(serving_now[0], requests(100))
        await asyncio.sleep(SEEN_S)
        began_s = time.perf_counter()
        callers = [asyncio.create_task(_keep_asking(front.url, asked, load, number)) for number in range(CALLERS)]
        callers += [asyncio.create_task(_keep_asking_much(front.url, load)) for _ in range(LARGE_CALLERS)]
        for _ in range(REPLACED):
            new, replacement = await _replaced(serving_now[0], free, front, leave_s)
            free = _port(serving_now[0])
            serving_now = [*serving_now[1:], new]
            replacements.append(replacement)
            print(f"{replacement}, failed so far: {load.failed}", file=sys.stderr, flush=True)
        load.over.set()
        await asyncio.gather(*callers)
        seconds = time.perf_counter() - began_s
    finally:
        for server in serving_now:
            server.process.kill()
            server.process.wait(PATIENCE_S)
    load.outcome.check()
    return load, replacements, seconds


def _started(port: int) -> Server:
    """On all cores: replicas on one would starve each other while one of them loads."""
    server = Server.start(port=port)
    os.sched_setaffinity(server.process.pid, range(os.cpu_count() or 1))
    return server


def _port(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


async def _replaced(old: Server, port: int, front: Front, leave_s: float | None) -> tuple[Server, Replacement]:
    """A new one is started, and once the proxy must have seen that it is ready the old one is told to stop.

    With `leave_s` the proxy is told first, and the old one so many seconds later.
    """
    before_s = time.perf_counter()
    new = _started(port)
    await asyncio.to_thread(new.wait_until_ready)
    ready_s = time.perf_counter() - before_s
    if leave_s is not None:
        front.tell(port, "ready")  # it takes a replica for up at once: not before it is
    await asyncio.sleep(SEEN_S)
    if leave_s is not None:
        front.tell(_port(old), "maint")
        await asyncio.sleep(leave_s)
    before_s = time.perf_counter()
    code = await asyncio.to_thread(old.stop)
    return new, Replacement(ready_s, time.perf_counter() - before_s, code)


async def _keep_asking(url: str, asked: list[Known], load: Load, seed: int) -> None:
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        while not load.over.is_set():
            await ask(client, draw.choice(asked), load.outcome)
            load.asked += 1


async def _keep_asking_much(url: str, load: Load) -> None:
    """By the project's own client, which tries again."""
    draw = random.Random(0)
    async with AsyncClient(url) as client:
        while not load.over.is_set():
            ids = [[draw.randrange(256) for _ in range(LARGE_TOKENS)] for _ in range(LARGE_RESPONSES)]
            try:
                scored = await client.score_ids(ids[0][:10], ids)
            except (ClientError, httpx.HTTPError) as error:
                load.large["failed"] += 1
                print(f"a large request failed: {error}", file=sys.stderr, flush=True)
            else:
                load.large["answered"] += len(scored.results) == LARGE_RESPONSES


def figures(load: Load, replacements: list[Replacement], seconds: float) -> Json:
    """What docs/scale.md says."""
    codes = [one.exit_code for one in replacements]
    return {
        "rolling_failed": load.failed + sum(code != 0 for code in codes),
        "requests": load.asked,
        "unanswered": load.asked - sum(load.outcome.statuses.values()),
        **load.outcome.told(),
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
