"""What a client says while it retries: little, but not nothing."""

import logging

import pytest
from dense_reward.client.progress import RetryLog

URL, REFUSED = "http://user:a-key@a:1", ConnectionError("refused")


def test_an_outage_is_one_warning_after_two_seconds_then_rare_ones(caplog: pytest.LogCaptureFixture) -> None:
    log = RetryLog()
    with caplog.at_level(logging.INFO, "dense_reward.client"):
        for now_s in range(200):
            log.failed(URL, REFUSED, float(now_s), 1.0, 600.0)
            if now_s == 0:
                assert not caplog.records
        warned = [record.getMessage() for record in caplog.records]
        log.answered(URL, 200.0)
        log.answered(URL, 201.0)
    assert warned[0] == ("http://a:1 is not available (refused): retrying for up to 600 s; 2 attempts failed in 1 s")
    assert [int(line.split(" attempts")[0].split()[-1]) for line in warned] == [2, 60, 120]
    assert [record.getMessage() for record in caplog.records[3:]] == [
        "http://a:1 is available again after 200 s and 200 failed attempts"
    ]


def test_a_short_outage_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = RetryLog()
    with caplog.at_level(logging.INFO, "dense_reward.client"):
        log.failed(URL, REFUSED, 0.0, 0.5, 600.0)
        log.answered(URL, 0.6)
    assert not caplog.records
