"""Sockets that send a byte a second, and bodies that are too large, too deep or bombs: others do not suffer."""

import asyncio
import gzip
import itertools

from bench.reliability.load import Json, Outcome, closed_loop, requests, with_answers
from bench.reliability.server import Server, percentile, serving

SOCKETS, CLIENTS, CONCURRENCY, SECONDS = 500, 2, 2, 20.0
HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt_ids": [1], "response_ids": [[2]]}'


def measure() -> tuple[Json, Json]:
    with serving("--max-arrival-s", "10") as server:
        return asyncio.run(_measure(server))


async def _measure(server: Server) -> tuple[Json, Json]:
    asked = await with_answers(server, requests(200))
    load = {"clients": CLIENTS, "concurrency": CONCURRENCY, "seconds": SECONDS}
    await closed_loop(server, asked, clients=CLIENTS, concurrency=CONCURRENCY, seconds=3.0)
    alone, _ = await closed_loop(server, asked, **load)  # type: ignore[arg-type]
    over = asyncio.Event()
    malice = [asyncio.create_task(_drip(server, over, at)) for at in range(SOCKETS)]
    malice += [asyncio.create_task(_throw(server, over))]
    beside, _ = await closed_loop(server, asked, **load)  # type: ignore[arg-type]
    ready = await asyncio.to_thread(server.is_ready)
    over.set()
    await asyncio.gather(*malice)
    ratio = percentile(beside.answered_s, 0.99) / percentile(alone.answered_s, 0.99)
    behind: Json = {"sockets": SOCKETS, "ready": ready, "alone": alone.told(), "beside": beside.told()}
    return {"slowloris_p99_ratio": ratio if ready and _sound(beside) else None}, behind


def _sound(outcome: Outcome) -> bool:
    return not outcome.wrong and not outcome.lost and set(outcome.statuses) == {200}


async def _drip(server: Server, over: asyncio.Event, at: int) -> None:
    """Sends a byte a second, half of the sockets in the head and half in the body; comes again when it is let go."""
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


async def _throw(server: Server, over: asyncio.Event) -> None:
    """Bodies that must be refused, one after another."""
    bombs = itertools.cycle(
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
            writer.write(next(bombs))
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
