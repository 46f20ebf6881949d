"""The deadline of a request: --max-request-s, or less if the request's header X-Request-Timeout is lower."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from dense_reward.errors import refuse

HEADER = "X-Request-Timeout"


@asynccontextmanager
async def deadline(request: Request, max_s: float) -> AsyncIterator[float]:
    """Cancel the block at the request's deadline. Yields the seconds until then.

    Raises RequestError(deadline_exceeded) at the deadline, or invalid_request if the header is not a number of seconds.
    """
    given = request.headers.get(HEADER)
    header_s = math.inf if given is None else _seconds(given)
    seconds = min(header_s, max_s)
    try:
        async with asyncio.timeout(seconds) as limit:
            yield seconds
    except TimeoutError:
        if not limit.expired():
            raise  # a TimeoutError of the work itself, not of this deadline
        setter = HEADER if header_s <= max_s else "--max-request-s"
        message = f"no answer within {seconds:g} s ({setter}): the request was cancelled"
        raise refuse("deadline_exceeded", message) from None


def _seconds(given: str) -> float:
    try:
        seconds = float(given) if "_" not in given else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise refuse("invalid_request", f"{HEADER} must be a number of seconds above 0, such as 2.5", param=HEADER)
    return seconds
