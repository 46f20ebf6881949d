"""Clients that misbehave: they hang up midway, or send malformed, slow or too large requests."""

import asyncio
import gzip
import itertools
import random
import re
import socket
import subprocess
from collections import Counter
from pathlib import Path

import httpx2
import orjson

from bench.reliability.load import Json, Known, Outcome, ask, client_of, closed_loop, requests, with_answers
from bench.reliability.server import Server, percentile, serving

REQUESTS, WARM_UP, HANG_UP_SHARE, CONCURRENCY = 10_000, 2_000, 0.3, 24
CASES, ANSWER_S = 10_000, 20.0
SCHEMATHESIS = Path(".venv-fuzz/bin/schemathesis")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
"""No answer 500, and every answer with the status, media type, headers and body that the OpenAPI document describes."""
EXAMPLES = 500
"""Number of examples per operation of the API; there are about twenty-five operations."""
SERVER_ERROR = 500
REPLACEMENTS = [b"\x00", b'"', b"[", b"}", b"-1", b"1e400", b"\\ud800", b"\xff\xfe"]
INSERTIONS = [b"null", b"true", b"99999999999999999999", b"[[[[[[", b"\r\n\r\n"]
SOCKETS, SLOW_CLIENTS, SLOW_CONCURRENCY, SLOW_S = 500, 2, 2, 20.0
HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt_ids": [1], "response_ids": [[2]]}'


def measure_hangups() -> tuple[Json, Json]:
    """Growth of memory by callers that hang up midway; details: tokens computed, and tokens left in the queue."""
    with serving("--max-batch-tokens", "2048") as server:
        return asyncio.run(_hangups(server))


async def _hangups(server: Server) -> tuple[Json, Json]:
    known = await with_answers(server, requests(300, longest=30))
    await _round(server, known, WARM_UP)
    before = server.resident_bytes()
    computed_before = server.metric("dense_reward_computed_tokens_total")
    outcome, hung_up, stayed_tokens, sent_tokens = await _round(server, known, REQUESTS)
    await asyncio.sleep(1.0)
    queue = server.metric("dense_reward_queue_tokens")
    after = server.resident_bytes()
    figures: Json = {"hangup_memory_growth": after / before - 1}
    return figures, {
        "requests": REQUESTS,
        "left": hung_up,
        "resident_mb": {"before": before / 1e6, "after": after / 1e6},
        "queue_tokens_left": queue,
        "tokens": {
            "sent": sent_tokens,
            "of_those_who_stayed": stayed_tokens,
            "computed": server.metric("dense_reward_computed_tokens_total") - computed_before,
        },
        "those_who_stayed": outcome.summary(),
    }


async def _round(server: Server, known: list[Known], count: int) -> tuple[Outcome, int, int, int]:
    """Outcome of the callers that stayed, the number that hung up, and the tokens of those that stayed and of all."""
    draw, outcome = random.Random(1), Outcome()
    hung_up = stayed_tokens = sent_tokens = 0
    turns = iter(range(count))

    async def keep_asking(client: httpx2.AsyncClient) -> None:
        nonlocal hung_up, stayed_tokens, sent_tokens
        for _ in turns:
            one = draw.choice(known)
            tokens = _tokens(one)
            sent_tokens += tokens
            if draw.random() >= HANG_UP_SHARE:
                await ask(client, one, outcome)
                stayed_tokens += tokens
                continue
            try:
                await asyncio.wait_for(client.post("/score", json=one.body), draw.uniform(0.0, 0.2))
            except TimeoutError:
                hung_up += 1

    async with client_of(server) as client:
        await asyncio.gather(*(keep_asking(client) for _ in range(CONCURRENCY)))
    outcome.check()
    return outcome, hung_up, stayed_tokens, sent_tokens


def _tokens(known: Known) -> int:
    prompt = known.body["prompt_ids"]
    assert isinstance(prompt, list)
    return len(prompt) + known.tokens


def measure_fuzz() -> tuple[Json, Json]:
    """Counts server errors and hangs for schemathesis' requests and for mutated bytes, and undescribed answers."""
    limits = ("--max-body-bytes", "200000", "--max-arrival-s", "5")
    with serving(*limits) as server:
        described = _described(server)
        mutated = _mutated(server)
        ready = server.is_ready()
    failures = int(str(described["server_errors"])) + int(str(mutated["server_errors"])) + int(str(mutated["hangs"]))
    details: Json = {"schemathesis": described, "bytes": mutated, "ready": ready}
    return {"fuzz_500s": failures + (not ready), "fuzz_undescribed": described["undescribed"]}, details


def _described(server: Server) -> Json:
    """Runs schemathesis on the service's OpenAPI description. Raises RuntimeError if it cannot run."""
    if not SCHEMATHESIS.exists():
        raise RuntimeError(f"{SCHEMATHESIS} does not exist: `make reliability` installs it")
    options = ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples"]
    command = [str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", *options, str(EXAMPLES)]
    command += ["--header", "X-Request-Timeout: 60"]  # a generated one is often so short that the answer is 504
    command += ["--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--seed", "1"]
    command += ["--continue-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cases = re.search(r"([\d,]+) generated", done.stdout)
    if cases is None:
        raise RuntimeError(f"schemathesis did not run:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    found = Counter(re.findall(r"^- (?:\w+ )?([A-Z].+)$", done.stdout, re.MULTILINE))
    server_errors = found.pop("Server error", 0)
    return {
        "cases": int(cases[1].replace(",", "")),
        "server_errors": server_errors,
        "undescribed": found.total(),
        "exit_code": done.returncode,
        "found": "" if done.returncode == 0 else done.stdout[-4000:],
    }


def _mutated(server: Server) -> Json:
    """Sends valid requests with bytes changed, removed, doubled or inserted, in body and head."""
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
        body = _mutate(draw, body)
    path = draw.choice([b"/score", b"/score", b"/heatmap", b"/models", b"/admin/models", b"/docs"])
    method = draw.choice([b"POST", b"POST", b"POST", b"GET", b"PUT"])
    kind = draw.choice([b"application/json"] * 4 + [b"text/plain", b"application/json; charset=utf-16"])
    length = len(body) if draw.random() < 0.9 else draw.randrange(2 * len(body) + 2)
    head = b"%b %b HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nContent-Length: %d\r\n" % (method, path, kind, length)
    head += draw.choice([b"", b"", b"Content-Encoding: gzip\r\n", b"X-Request-Timeout: 1e999\r\n", b"Expect: 100\r\n"])
    head += b"Connection: close\r\n\r\n"
    return (_mutate(draw, head) if draw.random() < 0.3 else head) + body


def _mutate(draw: random.Random, data: bytes) -> bytes:
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
                changed[at : at + 1] = draw.choice(REPLACEMENTS)
            case _:
                changed[at:at] = draw.choice(INSERTIONS)
    return bytes(changed)


def _answer(server: Server, request: bytes) -> bytes | None:
    """Returns what the service sends until it closes the connection; None if it neither answers nor closes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=ANSWER_S) as caller:
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


def measure_slow_sockets() -> tuple[Json, Json]:
    """p99 of ordinary requests during an attack by slow sockets and refused bodies, divided by the p99 without it."""
    with serving("--max-arrival-s", "10") as server:
        return asyncio.run(_slow_sockets(server))


async def _slow_sockets(server: Server) -> tuple[Json, Json]:
    known = await with_answers(server, requests(200))
    load = {"clients": SLOW_CLIENTS, "concurrency": SLOW_CONCURRENCY, "seconds": SLOW_S}
    await closed_loop(server, known, clients=SLOW_CLIENTS, concurrency=SLOW_CONCURRENCY, seconds=3.0)
    alone, _ = await closed_loop(server, known, **load)  # type: ignore[arg-type]
    over = asyncio.Event()
    attacks = [asyncio.create_task(_drip(server, over, at)) for at in range(SOCKETS)]
    attacks += [asyncio.create_task(_send_refused(server, over))]
    attacked, _ = await closed_loop(server, known, **load)  # type: ignore[arg-type]
    ready = await asyncio.to_thread(server.is_ready)
    over.set()
    await asyncio.gather(*attacks)
    ratio = percentile(attacked.answered_s, 0.99) / percentile(alone.answered_s, 0.99)
    details: Json = {"sockets": SOCKETS, "ready": ready, "alone": alone.summary(), "beside": attacked.summary()}
    return {"slowloris_p99_ratio": ratio if ready and _all_right(attacked) else None}, details


def _all_right(outcome: Outcome) -> bool:
    return not outcome.wrong and not outcome.lost and set(outcome.statuses) == {200}


async def _drip(server: Server, over: asyncio.Event, at: int) -> None:
    """Sends one byte per second: in the head if `at` is odd, else in the body. Reconnects when it is disconnected."""
    start = HEAD if at % 2 else HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
    rest = b"X-Long: " + b"a" * 1000 if at % 2 else BODY
    while not over.is_set():
        try:
            _, writer = await asyncio.open_connection(*_address(server))
            writer.write(start)
            for byte in rest:
                writer.write(bytes([byte]))
                await writer.drain()
                if await _is_over(over, 1.0):
                    break
            writer.close()
        except OSError:
            await _is_over(over, 0.5)


async def _send_refused(server: Server, over: asyncio.Event) -> None:
    """Sends bodies that must be refused, one after another."""
    bodies = itertools.cycle(
        [
            HEAD + b"Content-Length: 99999999999\r\n\r\n",
            _framed(b"[" * 1_000_000),
            _framed(gzip.compress(b" " * 200_000_000), b"Content-Encoding: gzip\r\n"),
            _framed(b'{"messages": [], "tools": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ]
    )
    while not await _is_over(over, 0.2):
        try:
            reader, writer = await asyncio.open_connection(*_address(server))
            writer.write(next(bodies))
            await writer.drain()
            await asyncio.wait_for(reader.read(12), 30.0)
            writer.close()
        except OSError:
            continue


def _framed(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _is_over(over: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(over.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)
