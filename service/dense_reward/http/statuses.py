"""The statuses of refusals on routes whose contract others wrote: those that the clients of these routes expect."""

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dense_reward.errors import RETRY_UNAVAILABLE_S
from dense_reward.http.get_reward import PATH as GET_REWARD
from dense_reward.http.teacher import is_teacher

BUSY = {429: 503}
OF_TEACHERS = BUSY | {422: 400}


class PlainStatuses:
    """Middleware: clients of these routes try again after 503, as long as Retry-After says, but give up after 429.

    It also covers the limits of keys. On a teacher's routes, a bad request is 400.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        changed = expected(scope["path"]) if scope["type"] == "http" else {}
        if not changed:
            await self._app(scope, receive, send)
            return

        async def send_plain(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["status"] = changed.get(message["status"], message["status"])
                if message["status"] == 503:
                    MutableHeaders(scope=message).setdefault("Retry-After", str(int(RETRY_UNAVAILABLE_S)))
            await send(message)

        await self._app(scope, receive, send_plain)


def expected(path: str) -> Mapping[int, int]:
    """The service's statuses that change on a path, and what they become."""
    if is_teacher(path):
        return OF_TEACHERS
    return BUSY if path == GET_REWARD else {}
