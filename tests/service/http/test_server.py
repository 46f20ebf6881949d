"""Callers that stall, set short deadlines, or send small bodies that inflate, against a real server."""

import gzip
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import h11
import httpx2
import pytest
from dense_reward.http.server import AT_ONCE_BYTES
from faulty_engines import Gate, Recorder
from running_service import PATIENCE_S, Served, loading, served, wait_until

pytestmark = pytest.mark.slow

IDS = {"prompt_ids": [1], "response_ids": [[2]]}
DEADLINE = "X-Request-Timeout"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A service that soon closes stalled connections."""
    with served(max_arrival_s=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(max_body_bytes=10_000, max_json_depth=3) as running:
        yield running


@contextmanager
def connected(running: Served) -> Iterator[socket.socket]:
    host, port = running.client.base_url.host, running.client.base_url.port
    with socket.create_connection((host, port or 0), timeout=PATIENCE_S) as caller:
        yield caller


def rest_of(caller: socket.socket) -> bytes:
    """The bytes that come until the service closes the connection."""
    parts = []
    while part := caller.recv(65_536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", b"POST /sc", b"POST /score HTTP/1.1\r\nHost: a\r\nContent-"])
def test_a_head_that_does_not_come_is_not_waited_for(impatient: Served, sent: bytes) -> None:
    with connected(impatient) as caller:
        caller.sendall(sent)
        assert rest_of(caller) == b""


def test_neither_is_the_head_of_a_second_request(impatient: Served) -> None:
    with connected(impatient) as caller:
        caller.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert caller.recv(15) == b"HTTP/1.1 200 OK"
        caller.sendall(b"GET /hea")
        assert rest_of(caller).endswith(b'{"state":"ready"}')


def test_a_body_that_does_not_come_is_refused(impatient: Served) -> None:
    with connected(impatient) as caller:
        caller.sendall(head(99, "Connection: close") + b"{")
        answer = rest_of(caller)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"--max-arrival-s" in answer
    assert impatient.service.batcher.admission.held_tokens == 0


@pytest.mark.parametrize("request_line", [b"POST /nothing", b"GET /health"])
def test_neither_is_the_rest_of_a_body_that_was_answered_before_it_came(impatient: Served, request_line: bytes) -> None:
    with connected(impatient) as caller:
        caller.sendall(request_line + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert caller.recv(9) == b"HTTP/1.1 "
        caller.sendall(b"a")
        rest_of(caller)


def test_a_body_that_comes_after_its_answer_keeps_its_connection(service: Served) -> None:
    with connected(service) as caller:
        caller.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        assert caller.recv(15) == b"HTTP/1.1 200 OK"
        caller.sendall(b"aaGET /ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b'{"state":"ready","progress"' in rest_of(caller)


def test_many_answers_that_nobody_takes_are_not_waited_for() -> None:
    with served(max_arrival_s=0.3) as running, connected(running) as caller:
        caller.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        assert caller.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
        wait_until(lambda: is_cut_off(caller))


def is_cut_off(caller: socket.socket) -> bool:
    try:
        caller.send(b"x")
    except OSError:
        return True
    return False


def head(length: int, *more: str) -> bytes:
    lines = ["POST /score HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("more", [(), ("Connection: close",)])
def test_a_caller_that_takes_no_answer_is_not_waited_for(more: tuple[str, ...]) -> None:
    """The answer is larger than the socket buffers between server and caller."""
    body = json.dumps({"prompt_ids": [1], "response_ids": [[2] * 1000] * 500}).encode()
    with served(loading(Recorder()), max_arrival_s=0.3) as running, connected(running) as caller:
        caller.sendall(head(len(body), *more) + body)
        assert caller.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
        wait_until(lambda: is_cut_off(caller))


def test_a_request_whose_deadline_passes_is_cancelled_and_not_computed() -> None:
    gate = Gate()
    engine = Recorder(gate)
    with served(loading(engine)) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        body = {"prompt_ids": [7], "response_ids": [[8]]}
        late = running.client.post("/score", json=body, headers={DEADLINE: "0.2"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert DEADLINE in late.json()["error"]["message"]
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert running.service.batcher.admission.held_tokens == 0
        assert running.score(IDS).status_code == 200
    assert all(trunk.prompt_P.tolist() == [1] for batch in engine.batches for trunk in batch)


def test_a_request_without_a_deadline_has_that_of_the_setting() -> None:
    gate = Gate()
    with served(loading(Recorder(gate)), max_request_s=0.2) as running:
        late = running.score(IDS)
        gate.opened.set()
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "--max-request-s" in late.json()["error"]["message"]
        wait_until(lambda: running.service.batcher.admission.held_tokens == 0)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "1s", "1_0", ""])
def test_a_deadline_must_be_seconds(service: Served, given: str) -> None:
    refused = service.client.post("/score", json=IDS, headers={"X-Request-Timeout": given})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "X-Request-Timeout")


def compressed(running: Served, body: bytes, encoding: str = "gzip") -> httpx2.Response:
    return running.client.post("/score", content=body, headers=JSON | {"Content-Encoding": encoding})


def test_a_compressed_body_is_read_as_a_plain_one(service: Served) -> None:
    body = json.dumps(IDS).encode()
    assert compressed(service, gzip.compress(body, mtime=0)).json()["results"] == service.score(IDS).json()["results"]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "code"),
    [
        (gzip.compress(b" " * 5_000_000, mtime=0), "gzip", 413, "body_too_large"),
        (gzip.compress(b"{}", mtime=0)[:-3], "gzip", 400, "invalid_encoding"),
        (gzip.compress(b"{}", mtime=0) * 2, "gzip", 400, "invalid_encoding"),
        (b"{}", "gzip", 400, "invalid_encoding"),
        (b"{}", "br", 415, "unsupported_media_type"),
        (b"{}", "gzip, gzip", 415, "unsupported_media_type"),
    ],
)
def test_what_becomes_too_large_or_is_not_what_it_says_is_refused(
    service: Served, body: bytes, encoding: str, status: int, code: str
) -> None:
    refused = compressed(service, body, encoding)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("field", ["tools", "template_kwargs", "tool_calls"])
def test_what_is_nested_too_deep_is_refused(service: Served, field: str) -> None:
    def answer(depth: int) -> httpx2.Response:
        value = f'{{"a": {nested(depth - 1)}}}' if field == "template_kwargs" else nested(depth)
        chat = '{"messages": [{"role": "assistant", "content": "a"%s}]%s}'
        inside, after = (f', "{field}": {value}', "") if field == "tool_calls" else ("", f', "{field}": {value}')
        return service.client.post("/score", content=chat % (inside, after), headers=JSON)

    assert "--max-json-depth" not in answer(3).text
    assert "--max-json-depth" in answer(4).text
    assert answer(4).status_code == 422
    assert answer(2000).status_code == 400


def test_a_path_with_a_slash_at_its_end_is_another_path(service: Served) -> None:
    """A redirect would repeat the caller's Host header, and name http behind a proxy that ends TLS."""
    answer = service.client.post("/score/", json=IDS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "location" not in answer.headers


@pytest.mark.parametrize("path", ["/score", "/heatmap", "/health", "/nothing", "/docs", "/"])
def test_every_answer_has_security_headers(service: Served, path: str) -> None:
    headers = service.client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


def test_a_chunked_body_is_parsed_in_parts_and_a_declared_one_at_once(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk costs the parser as much as a request: 40,000 of them fit into what is received in one step."""
    parts: list[int] = []
    real = h11.Connection.receive_data

    def recorded(connection: h11.Connection, data: bytes) -> None:
        parts.append(len(data))
        real(connection, data)

    monkeypatch.setattr(h11.Connection, "receive_data", recorded)
    body = json.dumps(IDS).encode().ljust(9_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = head(0, "Connection: close").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + chunks
    for sent, in_parts in ((chunked, True), (head(9_000, "Connection: close") + body, False)):
        parts.clear()
        with connected(service) as caller:
            caller.sendall(sent)
            answer = rest_of(caller)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert sum(parts) == len(sent)
        assert (max(parts) <= AT_ONCE_BYTES) is in_parts
