"""How long a caller waits: the service's own limit, or less where the request says so. Knows no work."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from dense_reward.errors import refuse

HEADER = "X-Request-Timeout"


@asynccontextmanager
async def deadline(request: Request, max_s: float) -> AsyncIterator[float]:
    """Ends the block, and what it waits for, once its caller needs no answer any more; gives the seconds until then.

    Raises RequestError(deadline_exceeded), or invalid_request where the header is no number of seconds.
    """
    given = request.headers.get(HEADER)
    asked_s = math.inf if given is None else _seconds(given)
    seconds = min(asked_s, max_s)
    try:
        async with asyncio.timeout(seconds) as limit:
            yield seconds
    except TimeoutError:
        if not limit.expired():
            raise  # somebody else's
        whose = HEADER if asked_s <= max_s else "--max-request-s"
        message = f"no answer within {seconds:g} s ({whose}): what still waited was given up"
        raise refuse("deadline_exceeded", message) from None


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise refuse("invalid_request", f"{HEADER} must be seconds above 0, such as 2.5", param=HEADER)
    return seconds
