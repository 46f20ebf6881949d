"""Admission control: which requests get a permit, and how the others are refused."""

from contextlib import ExitStack

import pytest
from dense_reward.batching.admission import SMALL_SHARE, Admission
from dense_reward.batching.worker_threads import LARGE_TOKENS
from dense_reward.errors import RequestError


def test_a_full_queue_says_when_there_will_be_room() -> None:
    admission = Admission(capacity_tokens=1000)
    admission.measured(tokens=500, seconds=2.0)
    with (
        admission.permit(1000),
        pytest.raises(RequestError, match=r"1000 tokens \(--max-queue-tokens\) and is full") as e,
    ):
        admission.permit(1)
    assert (e.value.code, e.value.status) == ("queue_full", 429)
    assert admission.held_tokens == 0
    with admission.permit(999), admission.permit(750), pytest.raises(RequestError) as e:
        admission.permit(1)
    assert e.value.retry_after_s == pytest.approx(750 / 250)


def test_where_there_is_room_for_a_token_a_request_of_any_size_is_let_in() -> None:
    """Otherwise small requests would always leave too little room for large ones."""
    admission = Admission(capacity_tokens=1000)
    with admission.permit(999), admission.permit(1000):
        assert admission.held_tokens == 1999
        with pytest.raises(RequestError):
            admission.permit(1)
    assert admission.held_tokens == 0


def test_a_batch_that_computed_nothing_says_nothing_about_the_device() -> None:
    admission = Admission(capacity_tokens=1000)
    admission.measured(tokens=500, seconds=2.0)
    admission.measured(tokens=0, seconds=0.001)
    assert admission.rate_tokens_per_s == 250


def test_who_is_in_is_not_sent_away_for_having_been_estimated_too_low() -> None:
    admission = Admission(capacity_tokens=100)
    with admission.permit(60), admission.permit(10) as permit, admission.permit(40):
        permit.correct(50)
        assert admission.held_tokens == 150


def test_who_has_sent_nothing_yet_is_not_in() -> None:
    admission = Admission(capacity_tokens=100)
    with admission.permit(0) as permit, admission.permit(100), pytest.raises(RequestError) as refused:
        permit.correct(1)
    assert refused.value.code == "queue_full"
    assert admission.held_tokens == 0


def test_a_request_that_never_fits_is_refused_for_good_and_not_sent_to_try_again() -> None:
    admission = Admission(capacity_tokens=100)
    with (
        admission.permit(5000) as permit,
        pytest.raises(RequestError, match=r"101 tokens, .*--max-queue-tokens.*parts") as e,
    ):
        permit.correct(101)
    assert (e.value.code, e.value.retry_after_s) == ("too_long", None)
    assert admission.held_tokens == 0


def test_an_estimate_alone_refuses_nobody_for_good() -> None:
    """The estimate comes from the bytes of a body, and ids in JSON have many."""
    admission = Admission(capacity_tokens=100)
    with admission.permit(5000) as permit:
        permit.correct(100)
        assert admission.held_tokens == 100


def test_a_permit_is_given_back_whatever_happens_and_once() -> None:
    admission = Admission(capacity_tokens=100)
    with pytest.raises(KeyError), admission.permit(60):
        raise KeyError
    with admission.permit(60) as permit:
        permit.__exit__()
    assert admission.held_tokens == 0


def test_a_caller_who_cannot_wait_as_long_as_the_queue_is_told_at_once() -> None:
    admission = Admission(capacity_tokens=1000)
    with admission.permit(500):
        admission.check_wait(0.1)
        admission.measured(tokens=100, seconds=1.0)
        admission.check_wait(5.0)
        with pytest.raises(RequestError, match=r"the queue is 5\.0 s long.* within 2 s") as refused:
            admission.check_wait(2.0)
        assert refused.value.code == "queue_full"
        assert refused.value.retry_after_s == pytest.approx(3.0)
    admission.check_wait(0.1)


def test_large_requests_never_fill_the_share_of_small_ones() -> None:
    admission = Admission(capacity_tokens=SMALL_SHARE * LARGE_TOKENS)
    with admission.permit(admission.capacity_tokens), admission.permit(0) as other:
        other.estimate(LARGE_TOKENS)
        with pytest.raises(RequestError) as refused:
            other.estimate(LARGE_TOKENS + 1)
        assert refused.value.code == "queue_full"
        with pytest.raises(RequestError):
            admission.permit(1)  # the small ones have their share
        other.estimate(LARGE_TOKENS - 1)
        with admission.permit(1), pytest.raises(RequestError):
            admission.permit(1)
    assert (admission.held_tokens, admission.large_tokens) == (0, 0)


def test_large_bodies_that_grow_at_a_time_exceed_the_queue_by_one_of_them() -> None:
    admission = Admission(capacity_tokens=10 * LARGE_TOKENS)
    with ExitStack() as held:
        growing = [held.enter_context(admission.permit(2 * LARGE_TOKENS)) for _ in range(5)]
        refused = 0
        for permit in growing:
            try:
                permit.estimate(9 * LARGE_TOKENS)
            except RequestError:
                permit.__exit__()
                refused += 1
        assert refused == 3
        assert admission.held_tokens == 18 * LARGE_TOKENS


def test_small_requests_do_not_keep_out_a_large_body_that_is_being_read() -> None:
    admission = Admission(capacity_tokens=2 * LARGE_TOKENS)
    with admission.permit(LARGE_TOKENS), admission.permit(LARGE_TOKENS - 1), admission.permit(0) as permit:
        permit.estimate(LARGE_TOKENS + 1)
        permit.estimate(2 * LARGE_TOKENS)
        permit.correct(2 * LARGE_TOKENS)


def test_a_small_request_does_not_wait_for_large_ones() -> None:
    """Batches take from all requests in turn."""
    admission = Admission(capacity_tokens=10 * LARGE_TOKENS)
    admission.measured(tokens=100, seconds=1.0)
    with admission.permit(5 * LARGE_TOKENS):
        admission.check_wait(1.0)
        with pytest.raises(RequestError):
            admission.check_wait(1.0, is_large=True)
        with admission.permit(200), pytest.raises(RequestError):
            admission.check_wait(1.0)
