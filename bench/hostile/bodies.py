"""Hostile bodies, one at a time and eight at once: what other callers notice of them, and what memory stays taken."""

import resource
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.hostile.corpus import HostileBody, corpus
from bench.hostile.pair import options_of_pair
from bench.hostile.watch import Seen, Watcher, watching
from bench.reliability.server import LOAD_CORE, Server, pin

Json = dict[str, object]
MEMORY_LIMIT_BYTES = 4 * 1024**3
AT_ONCE = 8
DEADLINE_S = 10
"""X-Request-Timeout of each hostile request."""
SETTLE_S, ANSWER_S, MEMORY_BACK_S = 0.3, 60.0, 30.0
WARM_UP_S = 5.0
OK = 200


@dataclass(frozen=True, slots=True)
class Noticed:
    """What was noticed beside one body: the answers to it, and the longest waits of the others."""

    statuses: list[int]
    took_s: float
    health_ms: float
    honest_s: float
    honest_refused: int
    watchers_late_ms: float


def measure() -> tuple[Json, Json]:
    """Figures and details of the whole corpus, against a service whose memory is limited (RLIMIT_DATA)."""
    server = Server.start(*options_of_pair(), limits={resource.RLIMIT_DATA: MEMORY_LIMIT_BYTES})
    try:
        server.wait_until_ready()
        pin(0, LOAD_CORE)
        with watching(server.url, "health") as health, watching(server.url, "honest") as honest:
            time.sleep(WARM_UP_S)
            quiet = _noticed([], time.monotonic() - WARM_UP_S / 2, health, honest)
            before = server.resident_bytes()
            found = _attack_with_all(server, health, honest)
            died = server.process.poll() is not None
            after = before if died else _settled_bytes(server, before)
            peak = before if died else _peak_bytes(server)
    finally:
        server.process.kill()
        server.process.wait()
    figures: Json = {
        "bodies": len(corpus()),
        "worst_health_ms": max(noticed.health_ms for noticed in found.values()),
        "worst_honest_s": max(noticed.honest_s for noticed in found.values()),
        "memory_left_mb": (after - before) / 1e6,
        "oom_kills": int(died),
    }
    details: Json = {
        "quiet": _row(quiet),
        "memory_limit": f"RLIMIT_DATA of {MEMORY_LIMIT_BYTES} bytes",
        "resident_mb": {"before": before / 1e6, "peak": peak / 1e6, "after": after / 1e6},
        "watchers_late_ms": max(noticed.watchers_late_ms for noticed in found.values()),
        "honest_refused": sum(noticed.honest_refused for noticed in found.values()),
        "beside": {name: _row(noticed) for name, noticed in found.items()},
    }
    return figures, details


def _attack_with_all(server: Server, health: Watcher, honest: Watcher) -> dict[str, Noticed]:
    """What was noticed beside each body, alone and AT_ONCE times. Ends early if the service dies."""
    found: dict[str, Noticed] = {}
    for body in corpus():
        request = _with_deadline(body)
        for count in (1, AT_ONCE):
            if server.process.poll() is None:
                name = f"{body.name} x {count}"
                found[name] = _attack(server, request, count, health, honest)
                _report(name, found[name])
    return found


def _with_deadline(body: HostileBody) -> bytes:
    request = body.bytes_of_request()
    return request.replace(b"\r\n", f"\r\nX-Request-Timeout: {DEADLINE_S}\r\n".encode(), 1)


def _attack(server: Server, request: bytes, count: int, health: Watcher, honest: Watcher) -> Noticed:
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        statuses = list(pool.map(_status, [server.url] * count, [request] * count))
    time.sleep(SETTLE_S)
    return _noticed(statuses, begun, health, honest)


def _noticed(statuses: list[int], begun: float, health: Watcher, honest: Watcher) -> Noticed:
    ended = time.monotonic()
    healths, honests = _complete(health, begun, ended), _complete(honest, begun, ended)
    return Noticed(
        sorted(statuses),
        ended - begun,
        1e3 * max(seen.took_s for seen in healths),
        max(seen.took_s for seen in honests),
        sum(seen.status != OK for seen in honests + healths),
        1e3 * max(seen.late_s for seen in honests + healths),
    )


def _complete(watcher: Watcher, begun: float, ended: float) -> list[Seen]:
    """What was asked before the end, with the answer that was still due then."""
    while True:
        seen = watcher.seen(begun)
        if seen and seen[-1].asked_s >= ended:
            return [one for one in seen if one.asked_s < ended] or seen
        time.sleep(0.02)


def _status(url: str, request: bytes) -> int:
    """The status of the answer; 0 if the connection was closed without one."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=ANSWER_S) as caller:
        first = b""
        with suppress(OSError):  # refused before all was sent
            caller.sendall(request)
        with suppress(OSError):
            first = caller.recv(65_536)
            while caller.recv(1_048_576):
                pass
    return int(first[9:12]) if first.startswith(b"HTTP/1.1 ") else 0


def _settled_bytes(server: Server, before: int) -> int:
    """Resident memory once it is back, or after MEMORY_BACK_S."""
    end = time.monotonic() + MEMORY_BACK_S
    while server.resident_bytes() > before and time.monotonic() < end:
        time.sleep(1.0)
    return server.resident_bytes()


def _peak_bytes(server: Server) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _row(noticed: Noticed) -> Json:
    return {
        "statuses": noticed.statuses,
        "took_s": round(noticed.took_s, 3),
        "health_ms": round(noticed.health_ms, 1),
        "honest_s": round(noticed.honest_s, 3),
        "refused": noticed.honest_refused,
        "watchers_late_ms": round(noticed.watchers_late_ms, 1),
    }


def _report(name: str, noticed: Noticed) -> None:
    waits = f"health {noticed.health_ms:7.1f} ms, honest {noticed.honest_s:6.3f} s, refused {noticed.honest_refused}"
    waits += f", watchers late {noticed.watchers_late_ms:5.1f} ms"
    print(f"  {name:45} {waits}, {noticed.took_s:5.1f} s, {noticed.statuses}", file=sys.stderr, flush=True)
