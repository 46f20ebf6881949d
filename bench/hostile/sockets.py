"""More idle connections than files can be opened: what the log becomes, and whether others are still answered."""

import resource
import socket
import time
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

from bench.hostile.pair import options_of_pair
from bench.hostile.watch import watching
from bench.reliability.server import Server

Json = dict[str, object]
OPEN_FILES, SOCKETS, IDLE_S, RECOVERED_S = 256, 400, 60.0, 5.0
OK = 200


def measure() -> tuple[Json, Json]:
    """Bytes of log, and the longest wait for /health on new connections, while idle connections stay open."""
    server = Server.start(*options_of_pair(), limits={resource.RLIMIT_NOFILE: OPEN_FILES})
    try:
        server.wait_until_ready()
        before = server.log.stat().st_size
        with watching(server.url, "connect") as health:
            begun = time.monotonic()
            with ExitStack() as opened:
                _keep_open(server.url, opened, begun + IDLE_S)
            ended = time.monotonic()
            time.sleep(RECOVERED_S)
            during = [seen for seen in health.seen(begun) if seen.asked_s < ended]
            after = [seen for seen in health.seen(ended) if seen.asked_s >= ended + 1]
        log_bytes = server.log.stat().st_size - before
    finally:
        server.process.kill()
        server.process.wait()
    recovered = bool(after) and all(seen.status == OK for seen in after)
    figures: Json = {"idle_sockets_log_kb": log_bytes / 1e3, "idle_sockets_recovered": recovered}
    details: Json = {
        "open_files": OPEN_FILES,
        "sockets": SOCKETS,
        "seconds": IDLE_S,
        "health_during": {"asked": len(during), "worst_s": max((seen.took_s for seen in during), default=None)},
        "health_after": {"asked": len(after), "worst_s": max((seen.took_s for seen in after), default=None)},
    }
    return figures, details


def _keep_open(url: str, opened: ExitStack, until_s: float) -> None:
    """Opens SOCKETS connections, and opens another for each that the service closes."""
    place = urlsplit(url)
    held: list[socket.socket] = []
    while time.monotonic() < until_s:
        held = [one for one in held if not _is_closed(one)]
        for _ in range(SOCKETS - len(held)):
            with suppress(OSError):
                one = socket.create_connection((place.hostname, place.port), timeout=1.0)
                held.append(opened.enter_context(one))
        time.sleep(0.1)


def _is_closed(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return not one.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
