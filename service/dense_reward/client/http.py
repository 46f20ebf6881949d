"""The HTTP rules of the client: the connection, which failures are retried, after what delay and for how long.

Pure: sends nothing and never sleeps.
"""

import math
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import httpx2
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dense_reward.client.errors import ItemError, MismatchError, ScoringError, ServiceUnavailableError
from dense_reward.credentials import without_credentials

# A proxy sends 502 if the service behind it does not answer; the service itself never does.
RETRIED_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})
LONGEST_EXPONENT = 30
CONNECT_S = 10.0
# A request on a connection that the server is closing costs an attempt, so the client closes idle connections first.
# The service closes them after 75 s, uvicorn by default after 5 s, and a proxy after its own time.
LIMITS = httpx2.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=3.0)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The settings of httpx2 for both clients."""

    url: str
    headers: dict[str, str]
    timeout: httpx2.Timeout


def http_settings(base_url: str, timeout_s: float, retry_for_s: float, api_key: str | None) -> HttpSettings:
    """Check the arguments of a client. Raises ValueError, with the cure, for an invalid address or time."""
    example = "give it as in http://localhost:8000"
    given = "base_url" if "@" in base_url else f"base_url {base_url!r}"  # what precedes an @ can be a key
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:  # its message, too, can hold a key: http://user:KEY has a port that is no number
        raise ValueError(f"base_url is not an address: {example}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{given} has no http:// or https:// and host: {example}")
    if url.query or url.fragment or url.path.rstrip("/").endswith("/score"):
        raise ValueError(f"{given} is the address of one endpoint, not of the service: {example}")
    if not timeout_s > 0 or not retry_for_s >= 0:
        raise ValueError(f"timeout_s must be above 0 and retry_for_s at least 0, not {timeout_s} and {retry_for_s}")
    headers = {} if api_key is None else {"authorization": f"Bearer {_header_value(api_key)}"}
    # The pool has no time limit: a call waits for a connection as long as other calls use all of them.
    return HttpSettings(base_url, headers, httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S), pool=None))


def _header_value(api_key: str) -> str:
    """A key without white space around it: files end with a newline. The HTTP library's error would print the key."""
    key = api_key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("api_key must be ASCII letters, digits and signs, without spaces: give the key alone")
    return key


@dataclass(frozen=True, slots=True)
class Backoff:
    """Random delays between attempts, from `first_s` to a bound that doubles with each attempt up to `longest_s`."""

    first_s: float = 0.5
    longest_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.first_s <= self.longest_s:
            raise ValueError(f"a backoff needs 0 <= first_s <= longest_s, not {self.first_s} and {self.longest_s}")

    def delay_s(self, attempt: int, jitter: float) -> float:
        """The delay after attempt 0, 1, ... `jitter`: uniform in [0, 1), so that clients do not retry together."""
        bound_s = min(self.longest_s, self.first_s * 2.0 ** min(attempt + 1, LONGEST_EXPONENT))
        return self.first_s + jitter * (bound_s - self.first_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that can succeed later. `retry_after_s`: the delay that the service requested.

    `unnamed`: the host's name has no address. That is retried only if the host was reached before.
    """

    error: Exception
    retry_after_s: float | None = None
    unnamed: bool = False

    def delay_s(self, backoff: Backoff, attempt: int, jitter: float) -> float:
        """The delay that the service requested, or that of the backoff."""
        if self.retry_after_s is None:
            return backoff.delay_s(attempt, jitter)
        return self.retry_after_s + jitter * backoff.first_s


class Tries(Protocol):
    """The attempts of one call: to which URL, after what delay, and until when."""

    @property
    def url(self) -> str: ...
    @property
    def limit_s(self) -> float: ...
    def first_delay_s(self, now_s: float) -> float: ...
    def delay_s(self, failure: Failure, now_s: float, jitter: float) -> float: ...
    def answered(self) -> None: ...


@dataclass(slots=True)
class Patience:
    """The retries of one call to one URL. No attempt starts later than `limit_s` after the first one."""

    backoff: Backoff
    limit_s: float
    started_s: float
    attempts: int = 0
    url: str = ""

    def delay_s(self, failure: Failure, now_s: float, jitter: float) -> float:
        """Seconds to wait before the next attempt. Raises ServiceUnavailableError if that would be after `limit_s`."""
        delay_s = failure.delay_s(self.backoff, self.attempts, jitter)
        self.attempts += 1
        waited_s = now_s - self.started_s
        if waited_s + delay_s > self.limit_s:
            raise ServiceUnavailableError(str(failure.error), self.attempts, waited_s) from failure.error
        return delay_s

    def first_delay_s(self, now_s: float) -> float:
        """A call to one URL starts immediately."""
        return 0.0

    def answered(self) -> None:
        """Nothing else depends on this call."""


def unreachable(error: httpx2.TransportError) -> Failure:
    """A connection that was refused, reset, dropped or timed out. All are retried, because scoring is idempotent.

    Raises `error` if the request itself is invalid, ServiceUnavailableError if the certificate is.
    """
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        raise error
    url = without_credentials(error.request.url)
    what = f"{url}: {type(error).__name__}: {error or 'no answer in time'}"
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLError) and not _cut_short(cause) for cause in causes):
        cure = "if your own authority signed it, name its file in the environment variable SSL_CERT_FILE"
        raise ServiceUnavailableError(f"{what}: a TLS error is not retried; {cure}", 1, 0.0) from error
    return Failure(ConnectionError(what), unnamed=any(isinstance(cause, socket.gaierror) for cause in causes))


def no_such_host(failure: Failure) -> ServiceUnavailableError:
    """The error for a name without address that never had one."""
    return ServiceUnavailableError(f"{failure.error}: the host has no address: check base_url", 1, 0.0)


def _cut_short(error: ssl.SSLError) -> bool:
    """The other side closed the connection, as a restarted service does."""
    return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def refusal(response: httpx2.Response, *, has_answered: bool = False) -> Failure | None:
    """None for an answer, a Failure if another attempt can succeed. Raises ScoringError for all other statuses.

    `has_answered`: the service did so at this address before. Then a 500 that is not of the service is the proxy's: so
    Ray Serve answers if a replica dies during a request.
    """
    if response.is_success:
        return None
    error = scoring_error(response)
    is_proxys = has_answered and error.code == f"http_{HTTPStatus.INTERNAL_SERVER_ERROR:d}"
    if response.status_code in RETRIED_STATUSES or is_proxys:
        return Failure(error, _retry_after_s(response))
    raise error


def scoring_error(response: httpx2.Response) -> ScoringError:
    """The error of the service; if something else answered, an error that describes it."""
    status = response.status_code
    kind = MismatchError if status == HTTPStatus.CONFLICT else ScoringError
    try:
        body = _BODY.validate_json(response.content)
    except ValidationError:
        return kind(status, f"http_{status}", _not_of_this_service(response))
    if isinstance(body, _StateBody):
        return kind(status, body.state, body.progress)
    error = body.error
    return kind(status, error.code, error.message, error.param, tuple(error.items or ()), error.request_id)


class _Error(BaseModel):
    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    param: str | None = None
    items: list[ItemError] | None = None
    request_id: str | None = None


class _ErrorBody(BaseModel):
    model_config = ConfigDict(frozen=True)

    error: _Error


class _StateBody(BaseModel):
    """The body of /ready while the service cannot score."""

    model_config = ConfigDict(frozen=True)

    state: str
    progress: str


_BODY: TypeAdapter[_ErrorBody | _StateBody] = TypeAdapter(_ErrorBody | _StateBody)


def _not_of_this_service(response: httpx2.Response) -> str:
    url = without_credentials(response.request.url)
    if response.has_redirect_location:
        return f"{url} redirects to {without_credentials(response.headers['location'])}: give that address as base_url"
    start = response.text[:80]
    return f"{url} sent an error that is not of this service ({start!r}): check base_url"


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The seconds of Retry-After; None if there is no such header, or it holds a date."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if seconds >= 0 and math.isfinite(seconds) else None
