"""Bodies and heads that nobody would send: schemathesis over the API's description, and mutated bytes on sockets."""

import random
import re
import socket
import subprocess
from collections import Counter
from pathlib import Path

import orjson

from bench.reliability.load import Json, requests
from bench.reliability.server import Server, serving

CASES, PATIENCE_S = 10_000, 20.0
SCHEMATHESIS = Path(".venv-fuzz/bin/schemathesis")
EXAMPLES = 2_500
"""Of each operation; there are about ten."""
SERVER_ERROR = 500
PLACED = [b"\x00", b'"', b"[", b"}", b"-1", b"1e400", b"\\ud800", b"\xff\xfe"]
INSERTED = [b"null", b"true", b"99999999999999999999", b"[[[[[[", b"\r\n\r\n"]


def measure() -> tuple[Json, Json]:
    limits = ("--max-body-bytes", "200000", "--max-arrival-s", "5")
    with serving(*limits) as server:
        described = _described(server)
        mutated = _mutated(server)
        ready = server.is_ready()
    failures = int(str(described["server_errors"])) + int(str(mutated["server_errors"])) + int(str(mutated["hangs"]))
    behind: Json = {"schemathesis": described, "bytes": mutated, "ready": ready}
    return {"fuzz_500s": failures + (not ready)}, behind


def _described(server: Server) -> Json:
    """What schemathesis says of the API that the service describes. Raises RuntimeError where it cannot be run."""
    if not SCHEMATHESIS.exists():
        raise RuntimeError(f"{SCHEMATHESIS} is not there: make reliability installs it")
    options = ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples"]
    command = [str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", *options, str(EXAMPLES)]
    command += ["--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--seed", "1"]
    command += ["--continue-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cases = re.search(r"([\d,]+) generated", done.stdout)
    if cases is None:
        raise RuntimeError(f"schemathesis did not run:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    return {
        "cases": int(cases[1].replace(",", "")),
        "server_errors": len(re.findall(r"- Server error", done.stdout)),
        "exit_code": done.returncode,
        "found": "" if done.returncode == 0 else done.stdout[-4000:],
    }


def _mutated(server: Server) -> Json:
    """Good requests with bytes changed, cut, doubled or inserted, in body and head."""
    draw, statuses, hangs, tracebacks = random.Random(0), Counter[str](), 0, 0
    bodies = [orjson.dumps(known.body) for known in requests(50, longest=20)]
    bodies += [b'{"prompt": "1+1=", "responses": ["2", "3"]}', b'{"text": "a", "top_k": 3}']
    for _ in range(CASES):
        answer = _answer(server, _request(draw, draw.choice(bodies)))
        if answer is None:
            hangs += 1
            continue
        statuses[answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"] += 1
        tracebacks += b"Traceback" in answer
    return {
        "cases": CASES,
        "statuses": dict(sorted(statuses.items())),
        "server_errors": statuses[str(SERVER_ERROR)] + tracebacks,
        "hangs": hangs,
    }


def _request(draw: random.Random, body: bytes) -> bytes:
    if draw.random() < 0.7:
        body = _broken(draw, body)
    path = draw.choice([b"/score", b"/score", b"/heatmap", b"/models", b"/admin/models", b"/docs"])
    method = draw.choice([b"POST", b"POST", b"POST", b"GET", b"PUT"])
    kind = draw.choice([b"application/json"] * 4 + [b"text/plain", b"application/json; charset=utf-16"])
    length = len(body) if draw.random() < 0.9 else draw.randrange(2 * len(body) + 2)
    head = b"%b %b HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nContent-Length: %d\r\n" % (method, path, kind, length)
    head += draw.choice([b"", b"", b"Content-Encoding: gzip\r\n", b"X-Request-Timeout: 1e999\r\n", b"Expect: 100\r\n"])
    head += b"Connection: close\r\n\r\n"
    return (_broken(draw, head) if draw.random() < 0.3 else head) + body


def _broken(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(5):
            case 0:
                changed[at:at] = bytes([draw.randrange(256)])
            case 1:
                del changed[at : at + draw.randrange(1, 9)]
            case 2:
                changed[at:at] = changed[max(0, at - draw.randrange(1, 40)) : at]
            case 3:
                changed[at : at + 1] = draw.choice(
                    [b"\x00", b'"', b"[", b"}", b"-1", b"1e400", b"\\ud800", b"\xff\xfe"]
                )
            case _:
                changed[at:at] = draw.choice(INSERTED)
    return bytes(changed)


def _answer(server: Server, request: bytes) -> bytes | None:
    """What the service says until it closes the connection; None where it neither answers nor closes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as caller:
        try:
            caller.sendall(request)
            caller.shutdown(socket.SHUT_WR)
            parts = []
            while part := caller.recv(65_536):
                parts.append(part)
        except TimeoutError:
            return None
        except OSError:
            return b""
    return b"".join(parts)
