"""The rules of talking to the service over HTTP: the connection, which failures to try again, when and for how long.

Pure: sends nothing and sleeps nowhere.
"""

import math
from dataclasses import dataclass
from http import HTTPStatus

import httpx2
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dense_reward.client.errors import ItemError, MismatchError, ScoringError, ServiceUnavailableError

# 502 comes from a proxy in front of a service that is away; the service itself never sends it.
RETRIED_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})
LONGEST_EXPONENT = 30
# Idle connections are dropped before the service drops them (after 5 s), which would cost an attempt.
LIMITS = httpx2.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=3.0)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """What both clients tell httpx2."""

    url: str
    headers: dict[str, str]
    timeout: httpx2.Timeout


def http_settings(base_url: str, timeout_s: float, retry_for_s: float, api_key: str | None) -> HttpSettings:
    """Raises ValueError, with the cure, for an address or a time that cannot be meant."""
    example = "give it as in http://localhost:8000"
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"base_url {base_url!r} is no address ({error}): {example}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url {base_url!r} has no http:// or https:// and host: {example}")
    if url.query or url.fragment or url.path.rstrip("/").endswith("/score"):
        raise ValueError(f"base_url {base_url!r} is the address of one endpoint, not of the service: {example}")
    if not timeout_s > 0 or not retry_for_s >= 0:
        raise ValueError(f"timeout_s must be above 0 and retry_for_s at least 0, not {timeout_s} and {retry_for_s}")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    # A call may wait for one of the client's own connections for as long as others use them: that is no failure.
    return HttpSettings(base_url, headers, httpx2.Timeout(timeout_s, pool=None))


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between attempts: random, from `first_s` up to a bound that doubles each time until `longest_s`."""

    first_s: float = 0.5
    longest_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.first_s <= self.longest_s:
            raise ValueError(f"a backoff needs 0 <= first_s <= longest_s, not {self.first_s} and {self.longest_s}")

    def delay_s(self, attempt: int, luck: float) -> float:
        """Seconds to wait after attempt 0, 1, ...; `luck` is uniform in [0, 1) and keeps clients apart."""
        bound_s = min(self.longest_s, self.first_s * 2.0 ** min(attempt + 1, LONGEST_EXPONENT))
        return self.first_s + luck * (bound_s - self.first_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that may succeed later, and when the service asked to be called again."""

    error: Exception
    retry_after_s: float | None = None


@dataclass(slots=True)
class Patience:
    """How long one call has been tried already. No attempt starts later than `limit_s` after the first."""

    backoff: Backoff
    limit_s: float
    started_s: float
    attempts: int = 0

    def delay_s(self, failure: Failure, now_s: float, luck: float) -> float:
        """Seconds to wait before the next attempt. Raises ServiceUnavailableError where patience ends."""
        if failure.retry_after_s is None:
            delay_s = self.backoff.delay_s(self.attempts, luck)
        else:
            delay_s = failure.retry_after_s + luck * self.backoff.first_s
        self.attempts += 1
        waited_s = now_s - self.started_s
        if waited_s + delay_s > self.limit_s:
            raise ServiceUnavailableError(str(failure.error), self.attempts, waited_s) from failure.error
        return delay_s


def unreachable(error: httpx2.TransportError) -> Failure:
    """A connection that failed: refused, reset, dropped or timed out. Scoring is idempotent, so all are tried again.

    Raises `error` where the request itself was at fault.
    """
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        raise error
    url = error.request.url
    return Failure(ConnectionError(f"{url}: {type(error).__name__}: {error or 'no answer in time'}"))


def refusal(response: httpx2.Response) -> Failure | None:
    """None for an answer, a Failure for one that is worth another attempt. Raises ScoringError for all others."""
    if response.is_success:
        return None
    error = scoring_error(response)
    if response.status_code in RETRIED_STATUSES:
        return Failure(error, _retry_after_s(response))
    raise error


def scoring_error(response: httpx2.Response) -> ScoringError:
    """The service's own words, or, where something else answered, how to find out what."""
    status = response.status_code
    kind = MismatchError if status == HTTPStatus.CONFLICT else ScoringError
    try:
        body = _BODY.validate_json(response.content)
    except ValidationError:
        return kind(status, f"http_{status}", _foreign(response))
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
    """What /ready answers before the service can score."""

    model_config = ConfigDict(frozen=True)

    state: str
    progress: str


_BODY: TypeAdapter[_ErrorBody | _StateBody] = TypeAdapter(_ErrorBody | _StateBody)


def _foreign(response: httpx2.Response) -> str:
    url = response.request.url
    if response.has_redirect_location:
        return f"{url} redirects to {response.headers['location']}: give the address behind it as base_url"
    start = response.text[:80]
    return f"{url} answered in words that are not this service's ({start!r}): check base_url"


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds of Retry-After; None where there is none, or a date."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if seconds >= 0 and math.isfinite(seconds) else None
