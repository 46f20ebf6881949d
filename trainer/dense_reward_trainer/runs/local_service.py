"""A pair served in a process of its own, for jobs that need one for a while."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dense_reward import Client

from dense_reward_trainer.errors import JobError

HOST = "127.0.0.1"
PATIENCE_S, BETWEEN_S = 120.0, 0.2


@contextmanager
def serving(
    sft: Path, reference: Path, port: int, threads: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, ready to score; ended when the block is left. All cores, where threads is None.

    Raises JobError where it ends, as soon as it does, or does not become ready; it says why on stderr.
    """
    pair = ("--sft", str(sft), "--reference", str(reference))
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *pair, "--port", str(port), "--log-level", "warning"]
    command += [] if threads is None else ["--threads", str(threads)]
    url = f"http://{HOST}:{port}"
    # the bars of loading weights would only mix with those of the job
    with subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"}) as server:
        try:
            _wait_until_ready(server, url)
            _check_identity(server, url, sft, reference)
            yield server, url
        finally:
            server.terminate()


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    with Client(url, timeout_s=10.0) as client:
        while not client.ready():
            try:
                code = server.wait(BETWEEN_S)
            except subprocess.TimeoutExpired:
                pass
            else:
                raise JobError(f"the service ended with exit code {code} before it could score: it says why above")
            if time.monotonic() > deadline_s:
                raise JobError(f"the service at {url} cannot score after {PATIENCE_S:g} s")


def _check_identity(server: "subprocess.Popen[bytes]", url: str, sft: Path, reference: Path) -> None:
    """Another service may have taken the port between looking for a free one and serving."""
    with Client(url, timeout_s=10.0) as client:
        card = client.models()[0]
    if server.poll() is not None or (card.sft, card.reference) != (str(sft), str(reference)):
        raise JobError(f"{url} is answered by a service of {card.sft} and {card.reference}, not of {sft}: try again")


def free_port(wanted: int = 0) -> int:
    """The port that was asked for, or another one where it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {HOST}")
