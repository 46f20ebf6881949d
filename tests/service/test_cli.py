"""`dense-reward serve` as a process: a real pair, signals, exit codes, and the lines on stderr."""

import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from shutil import which

import httpx2
import numpy as np
import pytest
import torch
from dense_reward.cli import main
from dense_reward.http.server import MAX_OPEN_FILES
from dense_reward.settings import ENV_PREFIX
from running_service import wait_until
from tiny_models import copy_pair, plain_logprobs, random_trunk, write_pair
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0
ADDRESS = re.compile(r"running on (https?://127\.0\.0\.1:\d+)")
MAIN = "import sys; from dense_reward.cli import main; sys.exit(main())"
Pair = tuple[Path, Path]


@dataclass(slots=True)
class Process:
    """A started command. A thread collects the lines of its stderr."""

    popen: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(line.rstrip() for line in self.popen.stderr)

    def address(self) -> str | None:
        return next((found[1] for line in list(self.lines) if (found := ADDRESS.search(line))), None)

    def has_logged(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def exit_code(self) -> int:
        """Waits until the process ends; returns its exit code."""
        return self.popen.wait(PATIENCE_S)


def environment() -> Mapping[str, str]:
    """This process's environment without settings of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


@contextmanager
def serving(*arguments: str, before: str = "") -> Iterator[Process]:
    """A service on a free port. `before` is Python that runs in its process first."""
    command = [sys.executable, "-c", f"{before}\n{MAIN}", "serve", "--port=0", "--threads=1", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as popen:
        process = Process(popen)
        reader = threading.Thread(target=process.read)
        reader.start()
        try:
            yield process
        finally:
            popen.kill()
            popen.wait(PATIENCE_S)
            reader.join(PATIENCE_S)


@contextmanager
def client_of(process: Process) -> Iterator[httpx2.Client]:
    wait_until(lambda: process.address() is not None)
    with httpx2.Client(base_url=str(process.address()), timeout=PATIENCE_S, trust_env=False) as client:
        yield client


@contextmanager
def in_flight(client: httpx2.Client, body: bytes) -> Iterator[socket.socket]:
    """A request that is admitted and waits until the test sends the last byte of its body."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), PATIENCE_S) as caller:
        lines = ["POST /score HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        caller.sendall("\r\n".join([*lines, "", ""]).encode() + body[:-1])
        held = f"dense_reward_queue_tokens {float((len(body) - 1) // 4)}"
        wait_until(lambda: held in client.get("/metrics").text)
        yield caller


def rest_of(caller: socket.socket) -> bytes:
    """The bytes that come until the connection is closed or reset."""
    parts = []
    with suppress(ConnectionResetError):
        while part := caller.recv(65_536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("served"))


def test_a_pair_is_started_asked_and_stopped_with_a_request_in_flight(pair: Pair) -> None:
    with serving(f"--sft={pair[0]}", f"--reference={pair[1]}") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert_scores_of_plain_transformers(client, pair)
        body = json.dumps({"prompt_ids": [1] * 50, "response_ids": [[2] * 150, [3] * 150]}).encode()
        with in_flight(client, body) as caller:
            process.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: process.has_logged("new requests are refused"))
            caller.sendall(body[-1:])
            head, _, content = rest_of(caller).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert [row["length"] for row in json.loads(content)["results"]] == [150, 150]
        assert process.exit_code() == 0
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")
    assert not [line for line in process.lines if "Traceback" in line or "ERROR" in line]


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("--engine=fake", "--max-arrival-s=600", "--drain-s=600") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        with in_flight(client, b" " * 41) as caller:
            process.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: process.has_logged("new requests are refused"))
            process.popen.send_signal(signal.SIGTERM)
            assert process.exit_code() == 128 + signal.SIGTERM
            assert rest_of(caller) == b""
    assert process.has_logged("requests in flight are lost")


def assert_scores_of_plain_transformers(client: httpx2.Client, pair: Pair) -> None:
    trunk = random_trunk(0, 9, (12, 0, 20))
    body = {"prompt_ids": trunk.prompt_P.tolist(), "response_ids": [b.ids_T.tolist() for b in trunk.branches]}
    rows = client.post("/score", json=body | {"include": ["reward", "kl"]}).json()["results"]
    sft, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in pair)
    for branch, row in zip(trunk.branches, rows, strict=True):
        p, q = (plain_logprobs(model, trunk.prompt_P, branch.ids_T) for model in (sft, reference))
        reward = (p - q).gather(1, torch.from_numpy(branch.ids_T).long()[:, None])[:, 0]
        np.testing.assert_allclose(row["reward"], reward.numpy(), atol=1e-4)
        np.testing.assert_allclose(row["kl"], (p.exp() * (p - q)).sum(1).numpy(), atol=1e-4)


def test_a_checkpoint_that_cannot_be_served_ends_the_process_with_a_line_that_names_it(
    pair: Pair, tmp_path: Path
) -> None:
    sft, reference = copy_pair(pair, tmp_path)
    content = bytearray((reference / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (reference / "model.safetensors").write_bytes(content)
    with serving(f"--sft={sft}", f"--reference={reference}") as process:
        assert process.exit_code() == 1
    (error,) = [line for line in process.lines if "ERROR" in line]
    assert f"{reference}/model.safetensors does not match its hash in manifest.json" in error
    assert not any("Traceback" in line for line in process.lines)


def test_a_missing_checkpoint_is_asked_for_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--sft=runs/a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dense-reward: give both checkpoints: --sft DIR --reference DIR")


def test_a_port_that_is_taken_ends_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--engine=fake", f"--port={port}") as process:
            assert process.exit_code() != 0
    assert process.has_logged("address already in use")
    assert not any("Traceback" in line for line in process.lines)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_service_with_exit_code_0(stop: signal.Signals) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as `nohup dense-reward serve &` does
    with serving("--engine=fake", before=ignored) as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        process.popen.send_signal(stop)
        assert process.exit_code() == 0


def test_a_signal_ends_a_service_that_is_still_loading_with_exit_code_0(pair: Pair) -> None:
    """It waits for servers that do not exist, so it loads until it is stopped."""
    nowhere = "--engine=remote", "--sft-url=http://127.0.0.1:1", "--reference-url=http://127.0.0.1:1"
    with serving(f"--sft={pair[0]}", f"--reference={pair[1]}", *nowhere) as process, client_of(process) as client:
        wait_until(lambda: process.has_logged("waiting for a server"))
        assert client.get("/ready").status_code == 503
        assert client.post("/score", json={"text": "a"}).headers["retry-after"]
        process.popen.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
    assert not any("Traceback" in line for line in process.lines)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Writes a new certificate at each call."""
    certificate, private = folder / "certificate.pem", folder / "private.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(private), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, private


@contextmanager
def serving_https(folder: Path, *more: str) -> Iterator[tuple[Process, int, ssl.SSLContext]]:
    """A service with a certificate, which it checks at every tick; its port, and a context that trusts it."""
    certificate, private = make_certificate(folder)
    options = f"--tls-certificate={certificate}", f"--tls-private-key={private}", *more
    often = "from dense_reward.http import server; server.CERTIFICATE_CHECK_TICKS = 1"
    with serving("--engine=fake", *options, before=often) as process:
        wait_until(lambda: process.address() is not None)
        port = int(str(process.address()).rpartition(":")[2])
        yield process, port, ssl.create_default_context(cafile=str(certificate))


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_service_with_a_certificate_answers_https_only(tmp_path: Path) -> None:
    with serving_https(tmp_path) as (process, port, trusted):
        assert process.address() == f"https://127.0.0.1:{port}"
        assert httpx2.get(f"https://127.0.0.1:{port}/health", verify=trusted, trust_env=False).status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False)


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_renewed_certificate_is_taken_while_it_runs_and_a_broken_one_is_not(tmp_path: Path) -> None:
    with serving_https(tmp_path) as (process, port, _):
        certificate, _ = make_certificate(tmp_path)
        renewed = certificate.read_text()
        wait_until(lambda: ssl.get_server_certificate(("127.0.0.1", port)) == renewed)
        certificate.write_text("half")
        wait_until(lambda: process.has_logged("the old one stays in use"))
        assert ssl.get_server_certificate(("127.0.0.1", port)) == renewed


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_caller_that_reads_no_answer_is_cut_off_behind_tls_too(tmp_path: Path) -> None:
    with (
        serving_https(tmp_path, "--max-arrival-s=0.3") as (_, port, trusted),
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as caller,
    ):
        caller.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        assert caller.recv(15) == b"HTTP/1.1 200 OK"
        with pytest.raises(OSError):
            wait_until(lambda: not caller.send(b"x"))


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
def test_a_handshake_that_does_not_come_is_not_waited_for(tmp_path: Path, sent: bytes) -> None:
    with (
        serving_https(tmp_path, "--max-arrival-s=0.3") as (_, port, _),
        socket.create_connection(("127.0.0.1", port), PATIENCE_S / 4) as caller,  # asyncio waits for 60 s
    ):
        caller.sendall(sent)
        assert caller.recv(1) == b""


def test_at_the_limit_of_open_files_the_log_stays_short_and_idle_callers_make_room() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))"
    with serving("--engine=fake", before=limit) as process, ExitStack() as idle:
        wait_until(lambda: process.address() is not None)
        place = "127.0.0.1", int(str(process.address()).rpartition(":")[2])
        for _ in range(200):
            idle.enter_context(socket.create_connection(place, PATIENCE_S))
        with client_of(process) as client:
            assert client.get("/health").status_code == 200
        assert sum("no more connections can be opened" in line for line in process.lines) == 1
        assert not any("Traceback" in line for line in process.lines)


def test_the_soft_limit_of_open_files_is_raised() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))"
    with serving("--engine=fake", before=low) as process:
        wait_until(lambda: process.address() is not None)
        soft, _ = resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE)
    assert soft == (MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard))


def test_a_certificate_without_its_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--engine=fake", "--tls-certificate=a.pem"]) == 2
    assert "--tls-certificate FILE --tls-private-key FILE" in capsys.readouterr().err


def test_keys_are_isolated_only_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--engine=fake", "--isolate-keys"]) == 2
    assert "--api-keys-file" in capsys.readouterr().err


def test_a_service_that_other_hosts_can_reach_without_a_key_logs_a_warning() -> None:
    with serving("--engine=fake", "--host=0.0.0.0") as process:
        wait_until(lambda: process.has_logged("running on"))
    (warning,) = [line for line in process.lines if "WARNING" in line]
    assert "give --api-keys-file FILE to require a key" in warning


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == version("dense-reward")


def test_the_environment_of_the_process_is_read() -> None:
    command = [sys.executable, "-m", "dense_reward.cli", "serve", "--engine=fake"]
    env = {**environment(), "DENSE_REWARD_PROT": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dense-reward: the environment variable DENSE_REWARD_PROT is not a setting: did you mean DENSE_REWARD_PORT?"
    ]


def test_the_card_of_a_served_pair_is_logged_for_people_who_read_logs() -> None:
    with serving("--engine=fake") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        wait_until(lambda: process.has_logged(" ready: {"))
        (line,) = [line for line in process.lines if " ready: {" in line]
        assert json.loads(line.partition(" ready: ")[2]) == client.get("/models").json()["models"][0]
