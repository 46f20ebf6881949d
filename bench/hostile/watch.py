"""A process that asks a service one thing again and again: `python -m bench.hostile.watch URL KIND`.

A line on stdout for each answer: when it was asked for (monotonic seconds), how long it took, its status, and how late
this process itself woke up before: on a busy machine, waits of that length are not the service's.
"""

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

HONEST = b'{"prompt":"Name a river.","responses":["The Danube.","The Rhine."]}'
PAUSES_S = {"health": 0.005, "connect": 0.2, "honest": 0.02}
"""`connect`: /health on a new connection each time."""
PATIENCE_S = 120.0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer; status 0: none."""

    asked_s: float
    took_s: float
    status: int
    late_s: float


@dataclass(frozen=True, slots=True)
class Watcher:
    """A running process of one kind, and the file of its lines."""

    file: Path

    def seen(self, since_s: float) -> list[Seen]:
        """Answers to what was asked since then, and to what was under way."""
        lines = [line.split() for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found = [Seen(float(asked), float(took), int(status), float(late)) for asked, took, status, late in lines]
        return [seen for seen in found if seen.asked_s + seen.took_s >= since_s]


@contextmanager
def watching(url: str, kind: str) -> Iterator[Watcher]:
    """Asks until the end of the block."""
    with tempfile.NamedTemporaryFile("wb", prefix=f"{kind}-") as lines:
        command = [sys.executable, "-m", "bench.hostile.watch", url, kind]
        process = subprocess.Popen(command, stdout=lines)
        try:
            yield Watcher(Path(lines.name))
        finally:
            process.kill()
            process.wait()


def main(url: str, kind: str) -> None:
    connection: http.client.HTTPConnection | None = None
    host = urlsplit(url).netloc
    late_s = 0.0
    while True:
        before, status = time.monotonic(), 0
        try:
            connection = connection or http.client.HTTPConnection(host, timeout=PATIENCE_S)
            if kind == "honest":
                connection.request("POST", "/score", HONEST, JSON)
            else:
                connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            status = answer.status
            if kind == "connect":
                connection.close()
        except (OSError, http.client.HTTPException):
            connection = None
        took_s = time.monotonic() - before
        print(f"{before:.6f} {took_s:.6f} {status} {late_s:.6f}", flush=True)
        time.sleep(PAUSES_S[kind])
        late_s = time.monotonic() - before - took_s - PAUSES_S[kind]


if __name__ == "__main__":
    main(*sys.argv[1:])
