"""What uvicorn does not do: end connections on which nothing comes or nothing is taken, end at a second signal, and
take a renewed certificate.

Knows no routes.
"""

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
"""Requests that come so soon after the signal are still told that the service stops, and their connections end."""
TICKS_OF_A_LOOK = 50
"""A renewed certificate is seen after so many ticks of uvicorn, 0.1 s each."""


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT; at the second it ends, whatever is in flight.

    Connections that nothing comes on are closed only after NOTICE_S: a request may be on its way on one of them, and
    would be lost without an answer. A certificate that is renewed is that of the connections that come afterwards.
    """

    _told = False

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._certificate_stamp = self._stamp()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_OF_A_LOOK == 0 and (stamp := self._stamp()) != self._certificate_stamp:
            self._certificate_stamp = stamp
            self._take_certificate()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        log.info("stopping: nobody is let in any more")
        limit_s = self.config.timeout_graceful_shutdown
        if self.server_state.connections:
            notice_s = NOTICE_S if limit_s is None else min(NOTICE_S, limit_s / 2)
            await asyncio.sleep(notice_s)
            if limit_s is not None:
                self.config.timeout_graceful_shutdown = limit_s - notice_s  # type: ignore[assignment] # any seconds do
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told:
            log.warning("told to stop again: what is in flight is lost")
            os._exit(128 + sig)
        self._told = True
        super().handle_exit(sig, frame)

    def _stamp(self) -> list[int]:
        """When the certificate's files were written; a secret that is mounted changes where its links point."""
        files = [file for file in (self.config.ssl_certfile, self.config.ssl_keyfile) if file is not None]
        try:
            return [os.stat(file).st_mtime_ns for file in files]
        except OSError:
            return []

    def _take_certificate(self) -> None:
        """Unless the files are not whole, or do not belong together: then at their next change."""
        certificate, key = self.config.ssl_certfile, self.config.ssl_keyfile
        if self.config.ssl is None or certificate is None:
            return
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
            self.config.ssl.load_cert_chain(certificate, key)
        except OSError as error:
            log.error("the renewed certificate %s cannot be taken, the one before is served on: %s", certificate, error)
        else:
            log.info("the renewed certificate %s is taken", certificate)


class Connection(H11Protocol):
    """Ends where what must come does not come within `patience_s`, or nothing of an answer is taken for so long.

    What must come is a request's head, and the rest of a body that was answered before it was there.
    """

    patience_s: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._coming = _Alarm(self.loop)
        self._taking = _Alarm(self.loop)
        self._watch_caller()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_caller()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_caller()
        self._watch_answer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._coming.stop()
        self._taking.stop()
        super().connection_lost(exc)

    def _watch_caller(self) -> None:
        """Between requests uvicorn's own alarm is set; while one is answered, whoever reads its body has his own."""
        head_is_due = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        answered = self.cycle is not None and self.cycle.response_complete
        body_is_due = self.conn.their_state is h11.SEND_BODY and answered
        if not head_is_due and not body_is_due:
            self._coming.stop()
        elif not self._coming.is_set:
            self._coming.set(self.patience_s, self.transport.close)

    def _watch_answer(self) -> None:
        """What is written leaves the process as fast as its caller takes it; a closed connection waits for that too."""
        self._taking.stop()
        if left := self._unsent_bytes():
            self._taking.set(self.patience_s, lambda: self._abort_unless_taken(left))

    def _abort_unless_taken(self, before_bytes: int) -> None:
        if self._unsent_bytes() >= before_bytes:
            self.transport.abort()
        else:
            self._watch_answer()

    def _unsent_bytes(self) -> int:
        """Behind TLS what is encrypted lies in the transport below, of which the one above tells nothing."""
        below = getattr(getattr(self.transport, "_ssl_protocol", None), "_transport", None)
        unsent = self.transport.get_write_buffer_size()
        return unsent if below is None else unsent + int(below.get_write_buffer_size())


class _Alarm:
    """Calls once, later, unless it is stopped."""

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
    """The class of a server's connections; uvicorn makes them itself, and passes no option of ours on."""
    return type("PatientConnection", (Connection,), {"patience_s": patience_s})
