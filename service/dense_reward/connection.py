"""What uvicorn does not do: end connections on which nothing comes or nothing is taken, and end at a second signal.

Knows no routes.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("dense_reward")


NOTICE_S = 1.0
"""Requests that come so soon after the signal are still told that the service stops, and their connections end."""


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT; at the second it ends, whatever is in flight.

    Connections that nothing comes on are closed only after NOTICE_S: a request may be on its way on one of them, and
    would be lost without an answer.
    """

    _told = False

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        if self.server_state.connections:
            await asyncio.sleep(NOTICE_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told:
            log.warning("told to stop again: what is in flight is lost")
            os._exit(128 + sig)
        self._told = True
        super().handle_exit(sig, frame)


class Connection(H11Protocol):
    """Ends where a request's head is not there within `patience_s`, or where nothing of an answer is taken in that."""

    patience_s: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._head = _Alarm(self.loop)
        self._answer = _Alarm(self.loop)
        self._head.set(self.patience_s, self.transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head.stop()
        elif not self._head.is_set:
            self._head.set(self.patience_s, self.transport.close)

    def on_response_complete(self) -> None:
        self._watch_answer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._answer.stop()
        super().connection_lost(exc)

    def _watch_answer(self) -> None:
        """What is written leaves the process as fast as its caller takes it; a closed connection waits for that too."""
        self._answer.stop()
        if left := self.transport.get_write_buffer_size():
            self._answer.set(self.patience_s, lambda: self._abort_unless_taken(left))

    def _abort_unless_taken(self, before_bytes: int) -> None:
        if self.transport.get_write_buffer_size() >= before_bytes:
            self.transport.abort()
        else:
            self._watch_answer()


class _Alarm:
    """Calls once, later, unless it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._handle is not None

    def set(self, seconds: float, call: Callable[[], None]) -> None:
        self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def connection(patience_s: float) -> type[Connection]:
    """The class of a server's connections; uvicorn makes them itself, and passes no option of ours on."""
    return type("PatientConnection", (Connection,), {"patience_s": patience_s})
