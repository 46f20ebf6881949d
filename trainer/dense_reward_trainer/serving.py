"""A pair served in a process of its own, for jobs that need one for a while."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dense_reward import Client

HOST = "127.0.0.1"


@contextmanager
def serving(sft: Path, reference: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, ready to score; ended when the block is left.

    Raises ServiceUnavailableError where it does not become ready; it says why on stderr.
    """
    pair = ("--sft", str(sft), "--reference", str(reference))
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *pair, "--port", str(port), "--log-level", "warning"]
    url = f"http://{HOST}:{port}"
    # the bars of loading weights would only mix with those of the job
    with subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"}) as server:
        try:
            with Client(url) as client:
                client.wait_until_ready(120.0)
            yield server, url
        finally:
            server.terminate()


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
