"""An API key given in every way to service, client, jobs, chart and Compose: where it is in what they print or show.

The places are logs, answers, metrics, messages of errors, and the arguments of processes that got the key in a file. A
key that a user writes into a command is in that process's arguments by the user's choice, and is not counted.
"""

import base64
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dense_reward import Client
from dense_reward_trainer.runs.local_service import HOST, free_port

from bench.hostile.deployment import of_chart, of_compose
from bench.hostile.pair import hostile_pair
from bench.hostile.signals import wait_until

Json = dict[str, object]
KEY = "hostile-4f1c9be07a52d683"
PATIENCE_S = 120.0
BASIC = base64.b64encode(f"user:{KEY}".encode()).decode()
SCORE = '{"prompt":"two and two","response":" are four"}'


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key could be, and what is there."""

    name: str
    text: str

    @property
    def holds_key(self) -> bool:
        return KEY in self.text or BASIC in self.text


def measure() -> tuple[Json, Json]:
    """Number of places that hold the key."""
    places = [*of_service("text"), *of_service("json"), *of_client(), *of_job()]
    places += [Place(name, text) for name, text in (*of_chart(KEY), *of_compose(KEY))]
    found = [place.name for place in places if place.holds_key]
    return {"secrets_found": len(found), "places_searched": len(places)}, {
        "found": found,
        "places": [place.name for place in places],
    }


def requests(port: int) -> Iterator[bytes]:
    """Requests that carry the key as clients, proxies and mistakes send it: in headers, targets, bodies and names."""
    absolute = f"http://user:{KEY}@{HOST}:{port}"
    for target in ("/models", f"{absolute}/models", f"{absolute}/nowhere", f"//user:{KEY}@{HOST}/models"):
        for header in (f"Authorization: Bearer {KEY}", f"Authorization: Basic {BASIC}", f"Authorization: {KEY}"):
            yield f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n{header}\r\nConnection: close\r\n\r\n".encode()
    yield f"GET /models?key={KEY} HTTP/1.1\r\nHost: user:{KEY}@{HOST}\r\nConnection: close\r\n\r\n".encode()
    for header in (f"Authorization: Bearer {KEY}x", f"Authorization: Bearer {KEY}\x01"):
        head = f"POST /score HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(SCORE)}\r\n{header}\r\n"
        yield f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n{SCORE}".encode()


def of_service(log_format: str) -> Iterator[Place]:
    """Log, answers, metrics and arguments of a service with keys, at level debug."""
    with tempfile.TemporaryDirectory() as folder:
        keys, log, port = Path(folder, "keys.json"), Path(folder, "log"), free_port()
        keys.write_text(json.dumps([{"name": "user", "key": KEY, "rights": ["score", "admin"]}]))
        options = ["--engine=fake", f"--port={port}", "--log-level=debug", f"--log-format={log_format}"]
        command = [sys.executable, "-m", "dense_reward.cli", "serve", *options, f"--api-keys-file={keys}"]
        with log.open("wb") as file, subprocess.Popen(command, stderr=file, stdout=file) as process:
            try:
                wait_until(lambda: "ready: {" in log.read_text())
                wait_until(lambda: "running on" in log.read_text())
                answers = [_answer(port, request) for request in requests(port)]
                if not any(answer.startswith("HTTP/1.1 200") for answer in answers):
                    raise RuntimeError("the key was accepted nowhere, so nothing was searched")
                yield Place(f"service, {log_format}: answers", "".join(answers))
                metrics = f"GET /metrics HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\n\r\n"
                yield Place(f"service, {log_format}: metrics", _answer(port, metrics.encode()))
                yield Place(f"service, {log_format}: arguments", Path(f"/proc/{process.pid}/cmdline").read_text())
                keys.write_text(f'[{{"name": "user", "key": "{KEY}"')  # broken: the error is logged
                _answer(port, next(requests(port)))
            finally:
                process.terminate()
                process.wait(PATIENCE_S)
        yield Place(f"service, {log_format}: log", log.read_text())


def of_client() -> Iterator[Place]:
    """Messages of a client's errors, for addresses that are invalid or do not answer."""
    dead = f"http://user:{KEY}@{HOST}:{free_port()}"
    place = "client: http://user:KEY@HOST"
    yield Place(place, _message(lambda: Client(dead, retry_for_s=0).models()))
    invalid = (f"ftp://user:{KEY}@{HOST}", f"{dead}/score", f"http://user:{KEY}", f"//user:{KEY}@{HOST}")
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder, "rows.jsonl"), Path(folder, "scored.jsonl")
        rows.write_text(f"{SCORE}\n")
        for url in (*invalid, f"http://user:x#{KEY}@{HOST}", f"http://user:{KEY}@{HOST}:port"):
            place = url.replace(KEY, "KEY")
            yield Place(f"client: {place}", _message(partial(Client, url)))
            command = ["dense_reward.cli", "score", str(rows), "--url", url, "--out", str(out)]
            yield Place(f"dense-reward score: {place}", _output([sys.executable, "-m", *command], "base_url"))


def of_job() -> Iterator[Place]:
    """Output of a job whose service does not answer, with the key in the URL and in a file."""
    policy, _ = hostile_pair()
    with tempfile.TemporaryDirectory() as folder:
        file, address = Path(folder, "key"), f"{HOST}:{free_port()}"
        file.write_text(KEY)
        dpr = ["dense_reward_trainer.cli", "dpr", "arithmetic_dpr_tiny", f"policy={policy}", "held_out=null"]
        job = [sys.executable, "-m", *dpr, f"output_dir={folder}/run", "service_patience_s=1"]
        yield Place(
            "dpr: key in the URL", _output([*job, f"service_url=http://user:{KEY}@{address}"], "reward service")
        )
        keyed = [*job, f"service_url=http://{address}", f"service_key_file={file}"]
        yield Place("dpr: key in a file", _output(keyed, "reward service"))


def _answer(port: int, request: bytes) -> str:
    with socket.create_connection((HOST, port), timeout=PATIENCE_S) as one:
        one.sendall(request)
        return b"".join(iter(lambda: one.recv(65_536), b"")).decode("latin-1")


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:  # whatever it is, its message is searched
        return f"{error!r} {error}"
    raise RuntimeError("no error, so nothing was searched")


def _output(command: list[str], error: str) -> str:
    """What a command prints. Raises RuntimeError if it does not fail with this error: nothing was searched then."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode == 0 or error not in done.stderr:
        raise RuntimeError(f"not the error that was wanted: {done.stderr[-500:]}")
    return done.stdout + done.stderr
