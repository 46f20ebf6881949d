"""The outermost middleware: ids and security headers, answers to unexpected errors, log and metrics of each request."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dense_reward.credentials import without_credentials
from dense_reward.errors import RETRY_UNAVAILABLE_S, refuse
from dense_reward.http.bodies import error_response
from dense_reward.telemetry.logs import REQUEST_ID
from dense_reward.telemetry.metrics import Metrics
from dense_reward.telemetry.tracing import NANOSECONDS, Answered, Tracing

REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
STATUS_DISCONNECTED = 499  # only in the log and metrics: the caller disconnected before its answer
MAX_LOGGED_PATH = 500
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Headers of every answer that does not set them itself."""
QUIET = frozenset({"/health", "/ready", "/metrics", "/teacher/{teacher}/health"})
"""Routes that monitors poll. Their requests are logged at level debug only."""
log = logging.getLogger("dense_reward")


class Identify:
    """Gives every request an id, answers exceptions with 500 or 503, and reports each answer to log, metrics, traces.

    The id is the caller's X-Request-Id if that is safe to log, otherwise a random one.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None, is_draining: Callable[[], bool]
    ) -> None:
        self._app = app
        self._is_draining = is_draining
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started_ns, status = time.time_ns(), STATUS_DISCONNECTED
        before, token = time.perf_counter(), REQUEST_ID.set(request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if self._is_draining():
                    headers["Connection"] = "close"
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except (Exception, asyncio.CancelledError) as error:
            if status != STATUS_DISCONNECTED:  # the answer has begun: a second one cannot follow on this connection
                raise
            await _failure(error, request_id)(scope, receive, send_with_headers)
        finally:
            self._report(scope, status, started_ns, time.perf_counter() - before)
            REQUEST_ID.reset(token)

    def _report(self, scope: Scope, status: int, started_ns: int, seconds: float) -> None:
        route = _route(scope)
        self._metrics.request(route, status, seconds)
        level = logging.DEBUG if route in QUIET else logging.INFO
        path = without_credentials(scope["path"])[:MAX_LOGGED_PATH]  # can be a whole URL
        fields = {"method": scope["method"], "path": path, "route": route, "status": status}
        fields |= {"seconds": round(seconds, 6), "caller": scope["state"].get("caller")}
        log.log(level, "%s %s %s in %.3f s", scope["method"], path, status, seconds, extra=fields)
        if self._tracing is not None:
            ended_ns = started_ns + int(seconds * NANOSECONDS)
            stages_s = scope["state"].get("stages_s", {})
            request_id, headers = scope["state"]["request_id"], Headers(scope=scope)
            self._tracing.add(
                Answered(scope["method"], route, status, request_id, headers, started_ns, ended_ns, stages_s)
            )


def _route(scope: Scope) -> str:
    """The path of the request's route, also of a request that was refused before it was routed."""
    if "route" not in scope:
        routes = (route for route in scope["app"].routes if isinstance(route, Route))
        return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "unknown")
    return getattr(scope["route"], "path", "unknown")


def _failure(error: BaseException, request_id: str) -> Response:
    """The answer to a request that raised. It reveals nothing of the exception; the log has it.

    CancelledError comes from uvicorn, which cancels the requests that outlast --drain-s.
    """
    if isinstance(error, asyncio.CancelledError):
        message = "the service stopped before this request was done: send it to another replica"
        refusal = refuse("draining", message, retry_after_s=RETRY_UNAVAILABLE_S)
    else:
        log.error("a request failed", exc_info=error)
        refusal = refuse("internal", "the service failed on this request: its log has the error under this request id")
    return error_response(refusal, request_id)
