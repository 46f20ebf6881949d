"""Serves a pair or a token head in a separate process, for jobs that need a service for a while."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dense_reward import Client
from dense_reward.serving.pair_sources import pairs_of_run

from dense_reward_trainer.errors import JobError

HOST = "127.0.0.1"
PATIENCE_S, BETWEEN_S = 120.0, 0.2


@contextmanager
def serving(
    sft: Path, reference: Path, port: int, threads: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Starts a service and yields its process and its URL once it can score; stops it at the end of the block.

    `threads` None: all cores. Raises JobError as soon as the process exits, or if it is not ready in time. The service
    prints the reason to stderr.
    """
    with _service(("--sft", str(sft), "--reference", str(reference)), port, threads) as (server, url):
        _check_identity(server, url, {(str(sft), str(reference))})
        yield server, url


@contextmanager
def serving_run(folder: Path, port: int, threads: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `serving`, for the run of SFT in a folder: a pair for each of its references, named after its folder."""
    with _service(("--run", str(folder)), port, threads) as (server, url):
        pairs = pairs_of_run(folder)
        _check_identity(server, url, {(str(pair.sft), str(pair.reference)) for pair in pairs})
        yield server, url


@contextmanager
def serving_head(folder: Path, port: int, threads: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `serving`, for the token head in a folder."""
    with _service(("--token-head", str(folder)), port, threads) as (server, url):
        _check_identity(server, url, {(str(folder),)})
        yield server, url


@contextmanager
def _service(source: Sequence[str], port: int, threads: int | None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *source, "--port", str(port)]
    command += ["--log-level", "warning"]
    command += [] if threads is None else ["--threads", str(threads)]
    url = f"http://{HOST}:{port}"
    # Its progress bars for loading weights would mix with those of the job.
    with subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"}) as server:
        try:
            _wait_until_ready(server, url)
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
                raise JobError(
                    f"the service ended with exit code {code} before it could score: it printed the reason above"
                )
            if time.monotonic() > deadline_s:
                raise JobError(
                    f"the service at {url} is not ready after {PATIENCE_S:g} s: its messages, if any, are above; run "
                    "the same command again when the machine is less busy"
                )


def _check_identity(server: "subprocess.Popen[bytes]", url: str, wanted: set[tuple[str, ...]]) -> None:
    """Raises JobError if another process has opened the port since `free_port` found it free.

    `wanted`: what must be served: the folders of sft and reference of a pair, or that of a token head.
    """
    with Client(url, timeout_s=10.0) as client:
        served = {
            tuple(folder for folder in (card.sft, card.reference, card.token_head) if folder is not None)
            for card in client.models()
        }
    if server.poll() is not None or served != wanted:
        raise JobError(f"{url} is a service of {_in_words(served)}, not of {_in_words(wanted)}: try again")


def _in_words(models: set[tuple[str, ...]]) -> str:
    return ", ".join(sorted(" and ".join(folders) for folders in models))


def free_port(preferred: int = 0) -> int:
    """`preferred`, or another free port if it is taken."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {HOST}")
