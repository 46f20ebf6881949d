"""What every scoring route does with a request: admit it, read and parse its body, cancel the work of a lost caller."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from dense_reward.batching.admission import Permit
from dense_reward.batching.worker_threads import LARGE_TOKENS
from dense_reward.http.bodies import BodyLimits, Model, parse, read_body
from dense_reward.http.deadline import deadline
from dense_reward.http.json_size import SizeLimits, check_size
from dense_reward.records import Result
from dense_reward.serving.service import Service

BYTES_PER_TOKEN = 4  # estimated bytes per token, used until the tokens of a body are counted
# Up to these sizes a body is parsed on the event loop: a thread would cost more. A larger one uses a thread, because it
# would block the event loop.
SMALL_BODY_BYTES = 65_536
SMALL_BODY_CONTAINERS = 1_000


@asynccontextmanager
async def admitted(request: Request, service: Service) -> AsyncIterator[tuple[Permit, bytes]]:
    """Admit a request and read its body. The permit is held until the block ends, when the answer is built.

    Invariant: the permit counts everything that the request holds in memory. `hold` counts the received bytes (as
    estimated tokens); scoring replaces the estimate by the number of tokens. Raises the RequestErrors of `permit`,
    `check_wait`, `deadline` and `read_body`.
    """
    service.check_ready()
    admission, settings = service.batcher.admission, service.settings
    with admission.permit(0) as permit:
        async with deadline(request, settings.max_request_s) as seconds:

            def hold(size: int) -> None:
                tokens = size // BYTES_PER_TOKEN
                if tokens > LARGE_TOKENS >= permit.tokens:
                    admission.check_wait(seconds, is_large=True)
                permit.estimate(tokens)

            admission.check_wait(seconds)
            limits = BodyLimits(settings.max_body_bytes, settings.max_arrival_s)
            body = await read_body(request, limits, hold)
            service.release_memory_after(len(body))
            yield permit, body


async def parsed_body(body: bytes, model: type[Model], service: Service) -> Model:
    """A validated request. Raises RequestError, before any object is made if the body would make too many."""
    limits = SizeLimits.of(service.settings.max_body_bytes)
    if len(body) > SMALL_BODY_BYTES:
        return await service.lanes.large.run(_parse_checked, body, limits, model)
    if check_size(body, limits).containers > SMALL_BODY_CONTAINERS:
        return await service.lanes.small.run(parse, body, model)
    return parse(body, model)


def _parse_checked(body: bytes, limits: SizeLimits, model: type[Model]) -> Model:
    check_size(body, limits)
    return parse(body, model)


async def unless_disconnected(request: Request, answer: Coroutine[object, object, Result]) -> Result:
    """The answer. Cancels the work and raises ClientDisconnect if the caller disconnects first.

    The work is also cancelled if this coroutine is cancelled by its deadline or because the service stops.
    """
    work, disconnected = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({work, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        disconnected.cancel()


async def _disconnect(request: Request) -> None:
    """Returns when the caller has disconnected. Call it only after the body was read: it drops received messages."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def group_of(request: Request, service: Service) -> str | None:
    """The name of the key within which scores are shared; None: they are shared among all requests."""
    return getattr(request.state, "caller", None) if service.settings.isolate_keys else None
