"""Receives the bytes of an answer, within limits of time and size: a slow or lying service cannot hold a caller."""

import asyncio
import time
from collections.abc import Iterable

import httpx2

MAX_ANSWER_BYTES = 1 << 29
"""Far above the answer to the largest request; what is inflated counts in its inflated size."""


def read_all(response: httpx2.Response, timeout_s: float) -> httpx2.Response:
    """The answer with the rest of its body. Raises ReadTimeout if that takes longer, ReadError if it is too large."""
    until_s = time.monotonic() + timeout_s
    parts: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        _check_size(response, size)
        if time.monotonic() > until_s:
            raise httpx2.ReadTimeout(_late(timeout_s), request=response.request)
    return _whole(response, parts)


async def answer_within(timeout_s: float, client: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The whole answer to a request. Raises ReadTimeout if it takes longer, ReadError if the answer is too large.

    The time starts when the request is sent: before, it waits for a connection of the pool.
    """
    now_s = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as limit:

            async def trace(event: str, _: object) -> None:
                if event.endswith("send_request_headers.started"):
                    limit.reschedule(now_s() + timeout_s)

            request.extensions = {**request.extensions, "trace": trace}
            response = await client.send(request, stream=True)
            if limit.when() is None:  # another transport than httpx2's own reports no events
                limit.reschedule(now_s() + timeout_s)
            try:
                parts: list[bytes] = []
                size = 0
                async for part in response.aiter_bytes():
                    parts.append(part)
                    size += len(part)
                    _check_size(response, size)
                return _whole(response, parts)
            finally:
                await response.aclose()
    except TimeoutError:
        raise httpx2.ReadTimeout(_late(timeout_s), request=request) from None


def _check_size(response: httpx2.Response, size: int) -> None:
    if size > MAX_ANSWER_BYTES:
        raise httpx2.ReadError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes", request=response.request)


def _late(timeout_s: float) -> str:
    return f"the answer was not complete after {timeout_s:g} s"


def _whole(response: httpx2.Response, parts: Iterable[bytes]) -> httpx2.Response:
    """The answer as if it had come at once, and not compressed."""
    headers = response.headers.copy()
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        headers.pop(name, None)
    return httpx2.Response(response.status_code, headers=headers, content=b"".join(parts), request=response.request)
