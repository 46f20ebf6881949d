"""Logs: one line per request with its id and without the caller's text; callers cannot forge lines."""

import io
import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from dense_reward.telemetry.log_format import LogFormat
from dense_reward.telemetry.logs import REQUEST_ID, JsonLines, TextLines, configure
from running_service import PATIENCE_S, wait_until

FORGED = "fine\n2026-01-01 INFO dense_reward: forged\x1b[2J\u202e"


@pytest.fixture
def written() -> "tuple[logging.Logger, io.StringIO, logging.StreamHandler[io.StringIO]]":
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.Logger("dense_reward")
    logger.addHandler(handler)
    return logger, stream, handler


Written = tuple[logging.Logger, io.StringIO, "logging.StreamHandler[io.StringIO]"]


def test_a_line_cannot_be_forged(written: Written) -> None:
    logger, stream, handler = written
    handler.setFormatter(TextLines())
    logger.info("got %s", FORGED)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"INFO dense_reward: got fine⏎2026-01-01 INFO dense_reward: forged\u{1B}[2J\u{202E}")


def test_a_traceback_keeps_its_lines_and_shows_what_is_hidden(written: Written) -> None:
    logger, stream, handler = written
    handler.setFormatter(TextLines())
    try:
        raise ValueError("a\x1bb")
    except ValueError:
        logger.exception("failed")
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("  ") for line in lines[1:]), "none of them can pass for a record"
    assert lines[1].strip().startswith("Traceback")
    assert lines[-1] == r"  ValueError: a\u{1B}b"


def test_json_lines_carry_the_request_and_what_is_known_of_it(written: Written) -> None:
    logger, stream, handler = written
    handler.setFormatter(JsonLines())
    token = REQUEST_ID.set("r-1")
    logger.info("got %s", FORGED, extra={"status": 200, "caller": None})
    REQUEST_ID.reset(token)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    message = f"got {FORGED}"
    assert first == {
        "level": "info",
        "logger": "dense_reward",
        "message": message,
        "request_id": "r-1",
        "status": 200,
    }
    assert "request_id" not in second
    assert second["traceback"].endswith("ValueError: broken")


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_credentials_of_a_url_are_not_written(formatter: logging.Formatter, written: Written) -> None:
    logger, stream, handler = written
    handler.setFormatter(formatter)
    try:
        raise ValueError("http://user:a-key@host/path and https://a-key@host")
    except ValueError:
        logger.exception("GET /%s", "http://user:a-key@host/models")
    assert "a-key" not in stream.getvalue()
    assert "http://host/models" in stream.getvalue()


@pytest.mark.parametrize("kind", ["text", "json"])
def test_everything_goes_through_one_format(kind: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure("info", kind)
    assert [type(handler.formatter) for handler in root.handlers] == [TextLines if kind == "text" else JsonLines]
    assert root.level == logging.INFO
    assert not logging.getLogger("httpx2").isEnabledFor(logging.INFO), (
        "it logs a line for each query to a remote engine"
    )


def served_to(log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "dense_reward.cli", "serve", "--engine=fake", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, stderr=file)


def port_of(log: Path) -> int:
    wait_until(lambda: "running on" in log.read_text())
    return int(log.read_text().partition("running on http://127.0.0.1:")[2].split()[0].strip('",'))


def test_a_request_is_one_line_with_its_id_and_without_its_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served_to(log, "--port=0", "--log-format=json") as process:
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port_of(log)}", trust_env=False) as client:
                wait_until(lambda: client.get("/ready").status_code == 200)
                headers = {"X-Request-Id": "mine"}
                client.post("/score", json={"prompt": "secret prompt", "response": "secret response"}, headers=headers)
                client.get("/no%0Asuch%1bpath")
        finally:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (scored,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (scored["method"], scored["route"], scored["status"]) == ("POST", "/score", 200)
    assert 0 < scored["seconds"] < PATIENCE_S
    assert any(line.get("path") == "/no\nsuch\x1bpath" for line in lines)
    assert "secret" not in log.read_text()
    assert not any(line.get("path") == "/ready" for line in lines), "probes are not logged"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_of_logs_keeps_no_answer_back(tmp_path: Path) -> None:
    host = "127.0.0.2"  # tests in other processes bind ports of 127.0.0.1
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    with served_to(Path("/dev/full"), f"--host={host}", f"--port={port}", "--log-level=debug") as process:
        try:
            with httpx2.Client(base_url=f"http://{host}:{port}", trust_env=False) as client:

                def ready() -> bool:
                    try:
                        return client.get("/ready").status_code == 200
                    except httpx2.ConnectError:
                        return False

                wait_until(ready)
                answer = client.post("/score", json={"prompt_ids": [1], "response_ids": [[2]]})
                assert answer.status_code == 200
        finally:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
