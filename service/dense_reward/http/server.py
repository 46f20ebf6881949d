"""uvicorn, extended: closes stalled connections, exits at a second signal, and reloads a renewed TLS certificate."""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("dense_reward")

NOTICE_S = 1.0
"""Seconds for which connections stay open after the signal: a request that still arrives on one gets a 503."""
CERTIFICATE_CHECK_TICKS = 50
"""Number of uvicorn's ticks, 0.1 s each, between two checks of the certificate's files for changes."""


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT. At the second it exits immediately, and requests in flight are lost.

    Idle connections are closed only NOTICE_S after the first signal: a request can be on its way on one of them, and
    would be lost without an answer. A renewed certificate is used for connections that are opened afterwards.
    """

    _is_stopping = False

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        """`drain` is called once, at the beginning of the shutdown: from then on requests must be refused."""
        super().__init__(config)
        self._drain = drain
        self._certificate_stamp = self._stamp()

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
            log.warning("a second signal to stop: exiting now, requests in flight are lost")
            os._exit(128 + sig)  # sys.exit would wait for the threads that load or compute
        self._is_stopping = True
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._receiving = _Timer(self.loop)
        self._sending = _Timer(self.loop)
        self._watch_receiving()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receiving()

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


def connection(patience_s: float) -> type[Connection]:
    """A Connection class with its `patience_s`. uvicorn creates the connections, so we cannot pass them arguments."""
    return type("PatientConnection", (Connection,), {"patience_s": patience_s})
