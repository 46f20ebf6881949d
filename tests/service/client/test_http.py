"""Addresses, delays and time limits: when a client retries, and when it gives up."""

import contextlib
import pickle

import httpx2
import pytest
from dense_reward.client import Client
from dense_reward.client.errors import (
    ClientError,
    ItemError,
    MismatchError,
    ScoringError,
    ServiceUnavailableError,
    TokenizerMismatchError,
)
from dense_reward.client.http import Backoff, Failure, Patience, http_settings, refusal, unreachable
from hypothesis import given
from hypothesis import strategies as st

jitters = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "has no http:// or https:// and host"),
        ("", "has no http:// or https:// and host"),
        ("http://", "has no http:// or https:// and host"),
        ("ftp://host", "has no http:// or https:// and host"),
        ("http://host:port", "is not an address"),
        ("http://host/score", "address of one endpoint"),
        ("http://host/?model=a", "address of one endpoint"),
    ],
)
def test_a_mistaken_address_is_said_at_once_with_the_cure(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*http://localhost:8000"):
        Client(url)


@pytest.mark.parametrize(
    "url",
    ["ftp://user:a-key@host", "http://user:a-key", "http://user:x#a-key@host", "http://user:a-key@host/score"],
)
def test_a_mistaken_address_is_said_without_the_key_in_it(url: str) -> None:
    with pytest.raises(ValueError, match="give it as in") as raised:
        Client(url)
    assert "a-key" not in str(raised.value)


def test_a_service_that_does_not_answer_is_named_without_the_key_in_its_address() -> None:
    request = httpx2.Request("GET", "http://user:a-key@host/models")
    failure = unreachable(httpx2.ReadTimeout("late", request=request))
    assert isinstance(failure, Failure)
    assert "http://host/models" in str(failure.error)
    assert "a-key" not in repr(failure)


@pytest.mark.parametrize("url", ["http://host", "https://host:1/", "http://host/dense/reward/", "http://[::1]:8000"])
def test_an_address_may_have_a_path_and_end_as_it_likes(url: str) -> None:
    Client(url).close()


@pytest.mark.parametrize(("timeout_s", "retry_for_s"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, -1.0)])
def test_times_that_cannot_be_meant_are_refused(timeout_s: float, retry_for_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        Client("http://host", timeout_s=timeout_s, retry_for_s=retry_for_s)


def test_waiting_for_a_connection_of_ones_own_is_no_failure() -> None:
    timeout = http_settings("http://host", 5.0, 0.0, None).timeout
    assert (timeout.connect, timeout.read, timeout.pool) == (5.0, 5.0, None)


@given(st.integers(0, 10_000), jitters)
def test_delays_lie_between_the_first_and_the_longest(attempt: int, jitter: float) -> None:
    assert 0.5 <= Backoff().delay_s(attempt, jitter) <= 10.0


def test_delays_grow_and_luck_spreads_them() -> None:
    backoff = Backoff(first_s=1.0, longest_s=10.0)
    assert [backoff.delay_s(attempt, 0.5) for attempt in range(5)] == [1.5, 2.5, 4.5, 5.5, 5.5]
    assert backoff.delay_s(3, 0.0) == 1.0


@pytest.mark.parametrize(("first_s", "longest_s"), [(-1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_a_backoff_that_shrinks_is_refused(first_s: float, longest_s: float) -> None:
    with pytest.raises(ValueError, match="first_s <= longest_s"):
        Backoff(first_s, longest_s)


@given(st.lists(st.tuples(st.floats(0, 20), jitters), min_size=1, max_size=50), st.floats(0, 200))
def test_no_attempt_starts_after_patience_has_ended(attempts: list[tuple[float, float]], limit_s: float) -> None:
    patience, now_s = Patience(Backoff(), limit_s, started_s=100.0), 100.0
    for took_s, jitter in attempts:
        now_s += took_s
        with contextlib.suppress(ServiceUnavailableError):
            now_s += patience.delay_s(Failure(ConnectionError("refused")), now_s, jitter)
            assert now_s - 100.0 <= limit_s + 1e-9


def test_the_service_is_never_asked_earlier_than_it_said() -> None:
    patience = Patience(Backoff(), 100.0, started_s=0.0)
    failure = Failure(ConnectionError("busy"), retry_after_s=7.0)
    assert patience.delay_s(failure, 0.0, 0.0) == 7.0
    assert 7.0 <= patience.delay_s(failure, 0.0, 0.99) <= 7.5


def answered(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://host/score"))


@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("inf", None), ("Wed, 21 Oct", None)]
)
def test_retry_after_is_taken_in_seconds_and_nothing_else(header: str, seconds: float | None) -> None:
    failure = refusal(answered(503, **{"retry-after": header}))
    assert failure is not None
    assert failure.retry_after_s == seconds


def test_a_request_at_fault_is_not_sent_again() -> None:
    with pytest.raises(httpx2.LocalProtocolError):
        unreachable(httpx2.LocalProtocolError("bad header", request=httpx2.Request("GET", "http://host")))


@pytest.mark.parametrize(
    "error",
    [
        ScoringError(422, "too_long", "long", "text", (ItemError("too_long", "long", item=1),), "r"),
        MismatchError(409, "revision_mismatch", "other"),
        ServiceUnavailableError("refused", 3, 1.5),
        TokenizerMismatchError("a", "b", "m"),
    ],
)
def test_errors_survive_the_way_out_of_a_worker_process(error: ClientError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    "key", ["", "two words of a key", "clé-de-seize-lettres", "first-key-of-the-file\nsecond-key-of-the-file"]
)
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be ASCII letters, digits and signs") as raised:
        Client("http://localhost:8000", api_key=key)
    assert not key or key not in str(raised.value)


def test_the_newline_at_the_end_of_a_key_file_is_no_part_of_the_key() -> None:
    """The HTTP library would refuse it, with the key in its error."""
    assert http_settings("http://h", 1, 1, "a-key-of-a-file\n").headers == {"authorization": "Bearer a-key-of-a-file"}
