"""Authentication: which path needs which right, and which key gives it.

Without a key only paths that reveal nothing are answered.
"""

import base64
import re
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dense_reward.errors import RequestError, refuse
from dense_reward.http.bodies import error_response
from dense_reward.http.keys import Caller, Keys

# The page and the API documentation are the same for every deployment: they reveal no pair and no text.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
OPEN_FOLDERS = ("/web/", "/docs/assets/")
TEACHER_HEALTH = re.compile(r"/teacher/[^/]+/health")
METRICS = "/metrics"
ADMIN = "/admin"


class Auth:
    """Middleware that passes on requests whose key has the right. If `keys` is None, only /admin is refused."""

    def __init__(self, app: ASGIApp, keys: Keys | None, *, open_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = OPEN_PATHS | ({METRICS} if open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if self._keys is None:
                raise refuse("forbidden", "routes of /admin need --api-keys-file FILE, and a key with the right admin")
            caller = _authenticated(self._keys, headers)
            _check_right(caller, scope["path"])
            scope.setdefault("state", {})["caller"] = caller.name
            with caller.admitted(self._keys.now_s):
                await self._app(scope, receive, send)
        except RequestError as error:
            response = error_response(error, scope["state"]["request_id"])
            if error.status == 401:
                response.headers.update({"WWW-Authenticate": _challenge(headers)})
            await response(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if self._keys is None:
            return not _is_admin(path)
        return path in self._open or path.startswith(OPEN_FOLDERS) or bool(TEACHER_HEALTH.fullmatch(path))


def _authenticated(keys: Keys, headers: Mapping[str, str]) -> Caller:
    given = _key(headers.get("authorization", ""))
    if given is None:
        raise refuse("unauthorized", "a key is required: send the header 'Authorization: Bearer KEY'")
    caller = keys.caller(given)
    if caller is None:
        raise refuse("unauthorized", "the key is unknown: send one of --api-keys-file")
    return caller


def _key(authorization: str) -> str | None:
    """The key in a header: the token of Bearer, or the password of Basic (http://name:KEY@host)."""
    scheme, _, rest = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return rest.strip() or None
        case "basic":
            try:
                return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
            except ValueError:  # the header is not base64, ASCII or UTF-8
                return None
    return None


def _check_right(caller: Caller, path: str) -> None:
    """Raises RequestError(forbidden). /admin needs the right admin, /metrics any key, every other path score."""
    if path == METRICS:
        return
    needed = "admin" if _is_admin(path) else "score"
    if needed not in caller.rights:
        raise refuse("forbidden", f"key {caller.name} has no right to {needed} (rights of its entry)")


def _is_admin(path: str) -> bool:
    return path == ADMIN or path.startswith(f"{ADMIN}/")


def _challenge(headers: Mapping[str, str]) -> str:
    """The value of WWW-Authenticate. Basic makes a browser ask for a password.

    That is right when a browser opens a page, but not for requests of the page's own script: those get Bearer.
    """
    if "text/html" in headers.get("accept", ""):
        return 'Basic realm="dense-reward: any name, and a key as password"'
    return 'Bearer realm="dense-reward"'
