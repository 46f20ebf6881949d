"""uvicorn, extended: closes stalled connections, exits at a second signal, and reloads a renewed TLS certificate.

It also bounds what callers can make it do with sockets: open files, handshakes, the log, and the parser of chunks.
"""

import asyncio
import errno
import faulthandler
import logging
import os
import resource
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, ClassVar, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("dense_reward")

NOTICE_S = 1.0
"""Seconds for which connections stay open after the signal: a request that still arrives on one gets a 503."""
MAX_OPEN_FILES = 65_535
"""The soft limit that most systems set, 1,024, is that of programs which use select."""
AT_ONCE_BYTES = 1_024
"""Bytes of chunked bodies that are parsed in one step. h11 (0.16) needs up to 5 ms for them if the chunks are tiny."""
CLOSED_AT_LIMIT = 64
"""Number of idle connections, the oldest, that are closed when no more can be opened."""
LIMIT_REPORT_S = 60.0
"""Seconds between two reports that no connection can be opened."""
OVERDUE_S = 0.5
"""Seconds after the end of the drain at which the process is ended from outside its event loop."""
FLUSH_S = 0.2
"""Seconds that the last lines of the log have to be written."""
CLOSE_S = 0.5
"""Seconds in which the other side of an idle TLS connection can confirm that it is closed."""
CERTIFICATE_CHECK_TICKS = 50
"""Number of uvicorn's ticks, 0.1 s each, between two checks of the certificate's files for changes."""


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT. At the second it exits immediately, and requests in flight are lost.

    Idle connections are closed only NOTICE_S after the first signal: a request can be on its way on one of them, and
    would be lost without an answer. A renewed certificate is used for connections that are opened afterwards.
    """

    _is_stopping = False
    _reported_limit_s = -LIMIT_REPORT_S
    _closes_idle = False

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        """`drain` is called once, at the beginning of the shutdown: from then on requests must be refused."""
        super().__init__(config)
        self._drain = drain
        self._certificate_stamp = self._stamp()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        if self.config.ssl is not None:  # uvicorn (0.54) passes no timeout on, so asyncio's 60 s would apply
            patience_s = getattr(self.config.http_protocol_class, "patience_s", None)
            limited = partial(loop.create_server, ssl_handshake_timeout=patience_s)
            setattr(loop, "create_server", limited)  # noqa: B010 - mypy refuses an assignment to a method
        await super().startup(sockets)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Called by asyncio (3.11) two thousand times in a row, each with a traceback, when no file can be opened."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in {errno.EMFILE, errno.ENFILE}:
            loop.default_exception_handler(context)
            return
        now = time.monotonic()
        if now - self._reported_limit_s >= LIMIT_REPORT_S:
            self._reported_limit_s = now
            message = "no more connections can be opened (%s): %d are open, the oldest idle ones are closed"
            log.error(message, error.strerror, len(self.server_state.connections))
        if not self._closes_idle:
            self._closes_idle = True
            loop.call_soon(self._close_idle)

    def _close_idle(self) -> None:
        self._closes_idle = False
        connections = [one for one in self.server_state.connections if isinstance(one, Connection) and one.is_idle]
        for connection in sorted(connections, key=lambda one: one.opened_s)[:CLOSED_AT_LIMIT]:
            connection.transport.close()

    async def on_tick(self, counter: int) -> bool:
        if counter % CERTIFICATE_CHECK_TICKS == 0 and (stamp := self._stamp()) != self._certificate_stamp:
            self._certificate_stamp = stamp
            self._reload_certificate()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        log.info("stopping: new requests are refused")
        limit_s = self.config.timeout_graceful_shutdown
        if self.server_state.connections:
            notice_s = NOTICE_S if limit_s is None else min(NOTICE_S, limit_s / 2)
            await asyncio.sleep(notice_s)
            if limit_s is not None:
                self.config.timeout_graceful_shutdown = limit_s - notice_s  # type: ignore[assignment] # any seconds do
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_stopping:
            exit_now(128 + sig, "a second signal to stop: exiting now, requests in flight are lost")
        self._is_stopping = True
        if self.config.timeout_graceful_shutdown is not None:
            # A thread in C that needs no interpreter: the event loop, or a thread that holds the interpreter, can hang.
            nowhere = os.open(os.devnull, os.O_WRONLY)  # standard error can be a pipe that is never read
            overdue_s = self.config.timeout_graceful_shutdown + OVERDUE_S
            faulthandler.dump_traceback_later(overdue_s, exit=True, file=nowhere)
        super().handle_exit(sig, frame)

    def _stamp(self) -> list[int]:
        """Modification times of the certificate's files; empty if one is missing, for example while it is replaced.

        stat follows symbolic links: a secret that Kubernetes mounts is renewed by changing where its links point.
        """
        files = [file for file in (self.config.ssl_certfile, self.config.ssl_keyfile) if file is not None]
        try:
            return [os.stat(file).st_mtime_ns for file in files]
        except OSError:
            return []

    def _reload_certificate(self) -> None:
        """Use the files for new connections. If they are incomplete or do not match, wait for their next change.

        They are first loaded into a context that no connection uses: a load that fails halfway would leave the live
        context with a certificate that does not match its key.
        """
        certificate, key = self.config.ssl_certfile, self.config.ssl_keyfile
        if self.config.ssl is None or certificate is None:
            return
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
            self.config.ssl.load_cert_chain(certificate, key)
        except OSError as error:
            log.error("the renewed certificate %s cannot be loaded, the old one stays in use: %s", certificate, error)
        else:
            log.info("the renewed certificate %s is in use", certificate)


class Connection(H11Protocol):
    """Closes itself if a caller sends too slowly, or reads no byte of its answer, for `patience_s`.

    It waits for two things that uvicorn (0.54) does not limit: the head of a request, and the rest of a body whose
    request was answered before the body was complete. Exactly one timer guards what a caller must send at any time:

    - the head of the first request, or of one that has begun: `_receiving`;
    - the head of a further request, on an idle connection: uvicorn's timeout_keep_alive;
    - a body that is being read: the timeout of `read_body`;
    - a body that is no longer read, because its request was answered: `_receiving`.

    `_sending` runs while bytes of an answer are not yet sent, also on a connection that is being closed.
    """

    patience_s: ClassVar[float]
    turns: ClassVar["deque[Connection]"]
    """The connections with more received bytes than are parsed in one step. Each step is the turn of one of them."""
    _unparsed = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self.opened_s = time.monotonic()
        self._receiving = _Timer(self.loop)
        self._sending = _Timer(self.loop)
        self._watch_receiving()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        waits = bool(self._unparsed)
        self._unparsed += data
        if not waits:
            self._parse_received()

    @classmethod
    def _next_turn(cls) -> None:
        connection = cls.turns.popleft()
        if cls.turns:
            connection.loop.call_soon(cls._next_turn)
        connection._parse_received()

    def _parse_received(self) -> None:
        """Parse what was received; of a chunked body AT_ONCE_BYTES, and the rest when it is this connection's turn."""
        if self.transport.is_closing():
            self._unparsed = b""
            return
        self._parse(AT_ONCE_BYTES)
        if self._unparsed and self.conn.their_state is h11.SEND_BODY and dict(self.headers).get(b"content-length"):
            self._parse(len(self._unparsed))
        self._watch_receiving()
        if self._unparsed:
            self.transport.pause_reading()
            if not self.turns:
                self.loop.call_soon(self._next_turn)
            self.turns.append(self)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def _parse(self, size: int) -> None:
        part, self._unparsed = self._unparsed[:size], self._unparsed[size:]
        super().data_received(part)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_receiving()
        self._watch_sending()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiving.stop()
        self._sending.stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close, if idle. A TLS connection would stay open until its other side has confirmed: up to 30 s."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(CLOSE_S, self._abort_if_sent)

    def _abort_if_sent(self) -> None:
        if not self._unsent_bytes():
            self.transport.abort()

    def _watch_receiving(self) -> None:
        """Start the timer if a head or the rest of a body is due, stop it if not.

        Bytes that arrive do not restart it: a caller that sends one byte at a time gets no more than patience_s.
        """
        head_is_due = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        answered = self.cycle is not None and self.cycle.response_complete
        body_is_due = self.conn.their_state is h11.SEND_BODY and answered
        if not head_is_due and not body_is_due:
            self._receiving.stop()
        elif not self._receiving.is_set:
            self._receiving.set(self.patience_s, self.transport.close)

    def _watch_sending(self) -> None:
        """Restart the timer if bytes of an answer are unsent. They are sent as fast as the caller reads."""
        self._sending.stop()
        if unsent := self._unsent_bytes():
            self._sending.set(self.patience_s, lambda: self._abort_if_stalled(unsent))

    def _abort_if_stalled(self, before_bytes: int) -> None:
        if self._unsent_bytes() >= before_bytes:
            self.transport.abort()  # close() would wait until the buffer is sent
        else:
            self._watch_sending()

    def _unsent_bytes(self) -> int:
        """Bytes that wait in the process to be sent.

        With TLS asyncio keeps encrypted bytes in an inner transport, whose buffer the outer transport does not count.
        """
        inner = getattr(getattr(self.transport, "_ssl_protocol", None), "_transport", None)
        unsent = self.transport.get_write_buffer_size()
        return unsent if inner is None else unsent + int(inner.get_write_buffer_size())


class _Timer:
    """Calls a function once, after a time, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._handle is not None

    def set(self, seconds: float, call: Callable[[], object]) -> None:
        self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def exit_now(code: int, message: str | None = None) -> NoReturn:
    """End the process with its log written. Waits neither for its threads nor for a log that is never read."""

    def last_lines() -> None:
        if message is not None:
            log.warning(message)
        logging.shutdown()

    writing = threading.Thread(target=last_lines, daemon=True)
    writing.start()
    writing.join(FLUSH_S)
    os._exit(code)


def raise_open_files() -> None:
    """Raise the soft limit on open files to MAX_OPEN_FILES, or to the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection(patience_s: float) -> type[Connection]:
    """A Connection class with its attributes. uvicorn creates the connections, so we cannot pass them arguments."""
    return type("PatientConnection", (Connection,), {"patience_s": patience_s, "turns": deque()})
