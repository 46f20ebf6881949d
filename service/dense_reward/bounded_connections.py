"""Limits the time of a whole answer to the synchronous client. The limits of httpx2 are of each read and each write.

httpx2 has no argument for the network backend of its connection pools, which httpcore2 offers (httpx2 2.4 to 2.16), so
`bounded` puts ours in its place. The asynchronous client needs none of this: its task is cancelled in time.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

import httpcore2
import httpx2
from httpcore2 import NetworkStream

PART_BYTES = 65_536
"""The time is looked at between parts of a body that is sent."""
_request = threading.local()


@contextmanager
def answered_within(timeout_s: float, request: httpx2.Request) -> Iterator[None]:
    """Reads and writes of this thread raise ReadTimeout once the request was sent `timeout_s` ago.

    Before it is sent, it waits for a connection of the pool.
    """

    def trace(event: str, _: object) -> None:
        if event.endswith("send_request_headers.started"):
            _request.until_s = time.monotonic() + timeout_s

    request.extensions = {**request.extensions, "trace": trace}
    _request.late = f"the answer was not complete after {timeout_s:g} s"
    try:
        yield
    finally:
        _request.until_s = None


def bounded(client: httpx2.Client) -> httpx2.Client:
    """The client, whose new connections obey `answered_within`."""
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            transport._pool._network_backend = _Backend()
    return client


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> NetworkStream:
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options))


class _Stream(NetworkStream):
    """A connection. Its limits are those of its caller, or the rest of the time of the answer."""

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _late():
            return self._stream.read(max_bytes, _rest(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), PART_BYTES):
            with _late():
                self._stream.write(buffer[at : at + PART_BYTES], _rest(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore2's
        return self._stream.get_extra_info(info)


def _until_s() -> float | None:
    """When the answer must be complete; None outside of `answered_within`, as while a connection is made."""
    found: float | None = getattr(_request, "until_s", None)
    return found


def _rest(timeout: float | None) -> float | None:
    until_s = _until_s()
    if until_s is None:
        return timeout
    rest_s = until_s - time.monotonic()
    if rest_s <= 0:
        raise httpcore2.ReadTimeout(_request.late)
    return rest_s if timeout is None else min(timeout, rest_s)


@contextmanager
def _late() -> Iterator[None]:
    try:
        yield
    except (httpcore2.ReadTimeout, httpcore2.WriteTimeout):
        until_s = _until_s()
        if until_s is None or time.monotonic() < until_s:
            raise
        raise httpcore2.ReadTimeout(_request.late) from None
