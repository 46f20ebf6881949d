"""`dense-reward serve` as a process: a real pair, signals, exit codes, and what stderr says."""

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from shutil import which

import httpx2
import numpy as np
import pytest
import torch
from dense_reward.cli import main
from running_service import wait_until
from tiny_models import copy_pair, plain_logprobs, random_trunk, write_pair
from transformers import AutoModelForCausalLM

PATIENCE_S = 60.0
ADDRESS = re.compile(r"running on (https?://127\.0\.0\.1:\d+)")
Pair = tuple[Path, Path]


@dataclass(slots=True)
class Process:
    """A started command; its stderr is read as it comes."""

    popen: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(line.rstrip() for line in self.popen.stderr)

    def address(self) -> str | None:
        return next((found[1] for line in list(self.lines) if (found := ADDRESS.search(line))), None)

    def ended(self) -> int:
        """Its exit code."""
        return self.popen.wait(PATIENCE_S)


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "dense_reward.cli", "serve", "--port=0", "--threads=1", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("served"))


def test_a_pair_is_started_asked_and_stopped_with_a_request_in_flight(pair: Pair) -> None:
    with serving(f"--sft={pair[0]}", f"--reference={pair[1]}") as process, client_of(process) as client:
        assert client.get("/ready").status_code == 503
        assert client.post("/score", json={"text": "a"}).headers["retry-after"]
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert_scores_of_plain_transformers(client, pair)
        items = [{"prompt_ids": [1] * 50, "response_ids": [[2] * 150, [3] * 150]}] * 400
        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(client.post, "/score", json={"items": items})
            wait_until(lambda: "dense_reward_queue_tokens 139200.0" in client.get("/metrics").text)
            process.popen.send_signal(signal.SIGTERM)
            answer = in_flight.result(PATIENCE_S)
        assert answer.status_code == 200
        assert len(answer.json()["results"]) == 800
        assert process.ended() == 0
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")
    assert not [line for line in process.lines if "Traceback" in line or "ERROR" in line]


def test_a_second_signal_ends_it_at_once(pair: Pair) -> None:
    with serving(f"--sft={pair[0]}", f"--reference={pair[1]}") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        items = [{"prompt_ids": [1] * 50, "response_ids": [[2] * 150, [3] * 150]}] * 2500
        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(client.post, "/score", json={"items": items})
            wait_until(lambda: "dense_reward_queue_tokens 870000.0" in client.get("/metrics").text)
            process.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: any("nobody is let in" in line for line in process.lines))
            process.popen.send_signal(signal.SIGTERM)
            assert process.ended() == 128 + signal.SIGTERM
            with pytest.raises(httpx2.RemoteProtocolError):
                in_flight.result(PATIENCE_S)
    assert any("what is in flight is lost" in line for line in process.lines)


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


def test_a_checkpoint_with_one_flipped_byte_ends_the_process_with_a_line_that_names_it(
    pair: Pair, tmp_path: Path
) -> None:
    sft, reference = copy_pair(pair, tmp_path)
    content = bytearray((reference / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (reference / "model.safetensors").write_bytes(content)
    with serving(f"--sft={sft}", f"--reference={reference}") as process:
        assert process.ended() == 1
    (error,) = [line for line in process.lines if "ERROR" in line]
    assert f"{reference}/model.safetensors does not match its hash in manifest.json" in error
    assert not any("Traceback" in line for line in process.lines)


def test_a_checkpoint_without_a_manifest_ends_the_process_with_the_cure(pair: Pair, tmp_path: Path) -> None:
    sft, reference = copy_pair(pair, tmp_path)
    (sft / "manifest.json").unlink()
    with serving(f"--sft={sft}", f"--reference={reference}") as process:
        assert process.ended() == 1
    (error,) = [line for line in process.lines if "ERROR" in line]
    assert f"dense-reward adopt {sft}" in error


def test_a_missing_checkpoint_is_asked_for_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--sft=runs/a"]) == 2
    assert capsys.readouterr().err.splitlines() == ["dense-reward: give both checkpoints: --sft DIR --reference DIR"]


def test_a_port_that_is_taken_ends_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--engine=fake", f"--port={port}") as process:
            assert process.ended() != 0
    assert any("address already in use" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_service_with_exit_code_0(stop: signal.Signals) -> None:
    with serving("--engine=fake") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        process.popen.send_signal(stop)
        assert process.ended() == 0


def test_a_signal_ends_a_service_that_is_still_loading_with_exit_code_0(pair: Pair) -> None:
    with serving(f"--sft={pair[0]}", f"--reference={pair[1]}") as process, client_of(process) as client:
        assert client.get("/ready").status_code == 503
        process.popen.send_signal(signal.SIGTERM)
        assert process.ended() == 0
    assert not any("Traceback" in line for line in process.lines)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Another one each time."""
    certificate, private = folder / "certificate.pem", folder / "private.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(private), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, private


@contextmanager
def serving_https(folder: Path, *more: str) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Its address, and what trusts it."""
    certificate, private = make_certificate(folder)
    options = f"--tls-certificate={certificate}", f"--tls-private-key={private}", *more
    with serving("--engine=fake", *options) as process:
        wait_until(lambda: process.address() is not None)
        yield str(process.address()), ssl.create_default_context(cafile=str(certificate))


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_https_alone_is_spoken_where_there_is_a_certificate(tmp_path: Path) -> None:
    with serving_https(tmp_path) as (address, trusted):
        assert address.startswith("https://")
        assert httpx2.get(f"{address}/health", verify=trusted, trust_env=False).status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{address}/health".replace("https", "http"), trust_env=False)


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_renewed_certificate_is_taken_while_it_runs_and_a_broken_one_is_not(tmp_path: Path) -> None:
    with serving_https(tmp_path) as (address, _):
        host, port = "127.0.0.1", int(address.rpartition(":")[2])
        certificate, _ = make_certificate(tmp_path)
        renewed = certificate.read_text()
        wait_until(lambda: ssl.get_server_certificate((host, port)) == renewed)
        certificate.write_text("half")
        time.sleep(6)  # until it was looked at
        assert ssl.get_server_certificate((host, port)) == renewed


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_caller_that_takes_no_answer_is_not_waited_for_behind_tls_either(tmp_path: Path) -> None:
    with serving_https(tmp_path, "--max-arrival-s=0.3") as (address, trusted):
        port = int(address.rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
            trusted.wrap_socket(plain, server_hostname="127.0.0.1") as caller,
        ):
            caller.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
            assert caller.recv(15) == b"HTTP/1.1 200 OK"
            with pytest.raises(OSError):
                wait_until(lambda: not caller.send(b"x"))


def test_a_certificate_without_its_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--engine=fake", "--tls-certificate=a.pem"]) == 2
    assert "--tls-certificate FILE --tls-private-key FILE" in capsys.readouterr().err


def test_keys_are_isolated_only_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--engine=fake", "--isolate-keys"]) == 2
    assert "--api-keys-file" in capsys.readouterr().err


def test_an_address_that_others_reach_is_warned_of_where_no_key_is_asked_for() -> None:
    with serving("--engine=fake", "--host=0.0.0.0") as process:
        wait_until(lambda: any("running on" in line for line in process.lines))
    (warning,) = [line for line in process.lines if "WARNING" in line]
    assert "--api-keys-file FILE asks for a key" in warning


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == version("dense-reward")


def test_the_environment_is_read_where_a_process_starts() -> None:
    command = [sys.executable, "-m", "dense_reward.cli", "serve", "--engine=fake"]
    done = subprocess.run(
        command, env={"DENSE_REWARD_PROT": "1"}, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dense-reward: DENSE_REWARD_PROT in the environment is no setting: did you mean DENSE_REWARD_PORT?"
    ]


def test_the_card_of_a_served_pair_is_logged_for_people_who_read_logs() -> None:
    with serving("--engine=fake") as process, client_of(process) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        wait_until(lambda: any(" ready: {" in line for line in process.lines))
        (line,) = [line for line in process.lines if " ready: {" in line]
        assert json.loads(line.partition(" ready: ")[2]) == client.get("/models").json()["models"][0]
