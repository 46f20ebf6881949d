"""SIGTERM, once and twice, to services one part of which hangs: how long after it the process ends.

Process 1 is tried in a PID namespace of its own, which needs root (`unshare --pid --fork --kill-child`).
"""

import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dense_reward_trainer.runs.local_service import HOST, free_port

Json = dict[str, object]
DRAIN_S, LATE_S, SECOND_LATE_S, GUARD_S, FIRST_PROCESS_S = 2, 1.0, 0.5, 30.0, 0.1
SERVE = "import sys; from dense_reward_start import main; sys.exit(main())"
BODY = b'{"prompt":"two and two","response":" are four"}'
HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
SCORE = HEAD % len(BODY) + BODY
READY = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
PARTS = ("device", "load", "encode", "interpreter", "log")
# The real command, a part of which never returns: a batch, a read while loading, an encoder, a thread that gives the
# interpreter to no other once the drain has begun (a regular expression), a log whose pipe is full: no one reads it.
HANGING = """
import re, sys, threading, time
from pathlib import Path
part, marker = sys.argv[1:3]
del sys.argv[1:3]
from dense_reward.engines import fake
from dense_reward.serving import loaders

def hang(*_, **__):
    Path(marker).touch()
    while part == "encode":
        pass
    if part == "log":
        sys.stderr.write("x" * 1_000_000)
    time.sleep(3600)

if part in ("device", "interpreter", "log"):
    fake._score = hang
if part == "interpreter":
    from dense_reward.serving.service import Service
    drain = Service.drain
    def hold(service):
        drain(service)
        threading.Thread(target=re.match, args=("(a+)+b", "a" * 60)).start()
    Service.drain = hold
elif part == "encode":
    fake.FakeTokenizer.encode = hang
elif part == "load":
    loaders.loader = lambda _: hang
from dense_reward.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. `after_s`: seconds from its last signal; `limit_s`: the bar for them."""

    case: str
    after_s: float
    limit_s: float
    code: int


def measure() -> tuple[Json, Json]:
    """Twenty ends: each busy part with one signal and with two, twice; process 1; a held interpreter; a full log."""
    ended = [one for _ in range(2) for one in _round()]
    ended += [busy("interpreter", twice=False), busy("log", twice=True)]
    single, second = ([one.after_s for one in ended if one.limit_s == limit_s] for limit_s in (_limit(1), _limit(2)))
    figures: Json = {
        "signals_tried": len(ended),
        "signals_late": sum(one.after_s > one.limit_s for one in ended),
        "signals_worst_s": round(max(single), 3),
        "second_signal_worst_s": round(max(second), 3),
    }
    return figures, {"drain_s": DRAIN_S, "ends": [asdict(one) for one in ended]}


def _round() -> Iterator[Ended]:
    for twice in (False, True):
        yield from (busy(part, twice=twice) for part in ("device", "load", "encode"))
        yield idle_tls(twice=twice)
    yield first_process()


def busy(part: str, *, twice: bool) -> Ended:
    """The end of a service, one of whose PARTS hangs."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        marker = Path(folder, "hangs")
        # The pipe of standard error is open, but never read.
        process, port = stack.enter_context(_started(HANGING, part, str(marker), stderr=subprocess.PIPE))
        if part != "load":
            caller = stack.enter_context(_answered(port))
            caller.sendall(SCORE)
        wait_until(marker.exists)
        time.sleep(0.5)  # the thread is then in what hangs
        return _ended(f"busy {part}", process, twice=twice)


def idle_tls(*, twice: bool) -> Ended:
    """The end of a service with a TLS connection that is kept alive and whose client does not read."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        new = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key} -out {certificate}"
        subprocess.run(new.split(), check=True, capture_output=True)
        options = ["--tls-certificate", str(certificate), "--tls-private-key", str(key)]
        process, port = stack.enter_context(_started(SERVE, options=options))
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        stack.enter_context(_answered(port, context))
        return _ended("idle TLS", process, twice=twice)


def hung_up() -> Ended:
    """The end of a service whose terminal is closed, or that is asked to read its configuration again."""
    hears = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # nohup would have it ignored here too
    with _started(hears + SERVE) as (process, port), _answered(port):
        process.send_signal(signal.SIGHUP)
        return _waited("SIGHUP", process, _limit(1))


def first_process(after_s: float = FIRST_PROCESS_S) -> Ended:
    """The end of a service that is process 1, and gets its signal `after_s` after its start."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", SERVE, *_options(free_port())]
    with subprocess.Popen(unshare, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        try:
            wait_until(lambda: bool(children.read_text().split()))
            time.sleep(after_s)
            subprocess.run(["kill", "-TERM", children.read_text().split()[0]], check=True)
            return _waited("process 1", parent, _limit(1))
        finally:
            parent.kill()


def _options(port: int) -> list[str]:
    return ["serve", "--engine", "fake", "--port", str(port), "--drain-s", str(DRAIN_S)]


@contextmanager
def _started(
    program: str, *arguments: str, options: list[str] | None = None, stderr: int = subprocess.DEVNULL
) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    port = free_port()
    command = [sys.executable, "-c", program, *arguments, *_options(port), *(options or [])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as process:
        try:
            yield process, port
        finally:
            process.kill()


def _ended(case: str, process: "subprocess.Popen[bytes]", *, twice: bool) -> Ended:
    process.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(0.3)  # two signals at once are one for the kernel
        process.send_signal(signal.SIGTERM)
    return _waited(f"{case}, two signals" if twice else case, process, _limit(1 + twice))


def _limit(signals: int) -> float:
    return DRAIN_S + LATE_S if signals == 1 else SECOND_LATE_S


def _waited(case: str, process: "subprocess.Popen[bytes]", limit_s: float) -> Ended:
    begun = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GUARD_S)
    after_s = round(time.monotonic() - begun, 3)
    return Ended(case, after_s, limit_s, -signal.SIGKILL if process.returncode is None else process.returncode)


def _answered(port: int, context: ssl.SSLContext | None = None) -> socket.socket:
    """A connection on which /ready has answered 200."""
    found: list[socket.socket] = []

    def connected() -> bool:
        with suppress(OSError):
            one = socket.create_connection((HOST, port), timeout=5.0)
            one = one if context is None else context.wrap_socket(one)
            one.sendall(READY)
            if one.recv(65_536).startswith(b"HTTP/1.1 200"):
                found.append(one)
            else:
                one.close()
        return bool(found)

    wait_until(connected)
    return found[0]


def wait_until(reached: Callable[[], bool]) -> None:
    """Raises RuntimeError after GUARD_S."""
    until_s = time.monotonic() + GUARD_S
    while not reached():
        if time.monotonic() > until_s:
            raise RuntimeError(f"not reached within {GUARD_S:g} s")
        time.sleep(0.05)
