"""Around every request: an id, a count, safe headers, and an answer even where the code breaks. Knows no routes."""

import asyncio
import logging
import re
import uuid

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dense_reward.body import error_response
from dense_reward.errors import RETRY_UNAVAILABLE_S, refuse
from dense_reward.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
STATUS_NOBODY_LISTENED = 499  # for the metrics: the caller hung up before its answer
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""What browsers are told with every answer that says nothing else."""
log = logging.getLogger("dense_reward")


class Identify:
    """Gives every request an id, its caller's own where that is sane; counts its answer; lets no exception out."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = STATUS_NOBODY_LISTENED

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            log.info("request %s: its caller went away", request_id)
        except (Exception, asyncio.CancelledError) as error:
            if status != STATUS_NOBODY_LISTENED:
                raise
            await _failure(error, request_id)(scope, receive, send_named)
        finally:
            self._metrics.request(getattr(scope.get("route"), "path", "unknown"), status)


def _failure(error: BaseException, request_id: str) -> Response:
    """What a caller gets instead of an answer. The server cancels requests that outlast --drain-s."""
    if isinstance(error, asyncio.CancelledError):
        refusal = refuse("draining", "the service stops and cannot finish this", retry_after_s=RETRY_UNAVAILABLE_S)
    else:
        log.error("request %s failed", request_id, exc_info=error)
        refusal = refuse("internal", "something broke here; the log has it under this id")
    return error_response(refusal, request_id)
