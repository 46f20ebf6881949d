"""The service as a separate process on its own core."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx2
from dense_reward_trainer.runs.local_service import HOST, free_port

PAIR = Path("runs/demo/checkpoints")
PATIENCE_S = 120.0
SERVER_CORE, LOAD_CORE = 0, 1


@dataclass(slots=True)
class Server:
    """A started service; `log` is the file of its stderr."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    @classmethod
    def start(cls, *arguments: str, port: int | None = None, limits: Mapping[int, int] | None = None) -> Self:
        """Starts the service on the first core, with one thread for the models. Does not wait until it is ready.

        `limits`: soft and hard limits of its process, by their number in the module resource.
        """
        port = free_port() if port is None else port
        options = ["--sft", str(PAIR / "sft"), "--reference", str(PAIR / "reference"), "--port", str(port)]
        command = [sys.executable, "-m", "dense_reward.cli", "serve", "--threads", "1", *options, *arguments]
        descriptor, name = tempfile.mkstemp(prefix="reliability-", suffix=".log")
        with os.fdopen(descriptor, "wb") as log:
            process = subprocess.Popen(command, stderr=log, env={**os.environ, "TQDM_DISABLE": "1"})
        for number, most in (limits or {}).items():
            resource.prlimit(process.pid, number, (most, most))
        pin(process.pid, SERVER_CORE)
        return cls(process, f"http://{HOST}:{port}", Path(name))

    def wait_until_ready(self) -> None:
        """Raises RuntimeError, with the end of the log, if the service exits or is not ready within PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the service exited or was not ready within {PATIENCE_S:.0f} s:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/ready", timeout=5.0, trust_env=False).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    def metric(self, name: str) -> float:
        """Sum of a metric's samples; 0 if there are none."""
        text = httpx2.get(f"{self.url}/metrics", timeout=PATIENCE_S, trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A ready service, which is killed at the end of the block."""
    server = Server.start(*arguments)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait(PATIENCE_S)


def pin(pid: int, core: int) -> None:
    """Restricts a process and its threads to one core if the machine has that core."""
    if (os.cpu_count() or 1) > core:
        os.sched_setaffinity(pid, {core})


def percentile(values: Sequence[float], share: float) -> float:
    """The value at this share of the sorted values; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
