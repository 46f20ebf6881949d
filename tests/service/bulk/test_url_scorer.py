"""Scoring with running services gives what the pair in this process gives."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from bulk_runs import TERMS, Json, a_job, rows_of, run_fake, write_rows
from dense_reward.bulk.job import Job, Writing, opened, score
from dense_reward.bulk.url_scorer import UrlScorer
from dense_reward.errors import BulkError
from running_service import served

pytestmark = pytest.mark.slow
ROWS: list[Json] = [
    *({"prompt": f"{n}+1", "responses": [f"{n + 1}", "x"]} for n in range(40)),
    {"prompt_ids": [1], "response_ids": [9999]},
    {"prompt_ids": [1], "response_ids": [2, 3]},
    {"text": "abc"},
    {"prompt": "a", "responses": ["数é", ""]},
]


def run_urls(job: Job, urls: Sequence[str]) -> None:
    async def whole(writer: Writing) -> None:
        scorer = UrlScorer(urls, None, TERMS)
        try:
            await scorer.start()
            await score(writer, scorer)
        finally:
            await scorer.close()

    with opened(job, lambda rows, tokens: None) as writer:
        asyncio.run(whole(writer))


def test_two_services_give_what_the_local_pair_gives(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", ROWS)
    run_fake(a_job(file, tmp_path / "local.jsonl", on_error="keep"))
    with served(max_items=16) as one, served() as other:
        urls = [str(each.client.base_url).rstrip("/") for each in (one, other)]
        run_urls(a_job(file, tmp_path / "urls.jsonl", on_error="keep"), urls)
    local, found = rows_of(tmp_path / "local.jsonl"), rows_of(tmp_path / "urls.jsonl")
    assert len(found) == len(local) == 85
    assert [row["error"] is None for row in found] == [row["error"] is None for row in local]
    for one_row, other_row in zip(local, found, strict=True):
        assert one_row.keys() == other_row.keys()
        assert one_row.get("reward") == other_row.get("reward")
        assert one_row.get("tokens") == other_row.get("tokens")


@pytest.mark.parametrize("other", [{"name": "other"}, {"max_length_tokens": 100}], ids=["name", "limit"])
def test_services_that_differ_are_refused(tmp_path: Path, other: Json) -> None:
    job = a_job(write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    with served() as one, served(**other) as two:
        urls = [str(each.client.base_url).rstrip("/") for each in (one, two)]
        with pytest.raises(BulkError, match=f"{urls[1]} serves {next(iter(other))}.*give URLs of equal services"):
            run_urls(job, urls)


def test_a_service_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_reward.bulk.url_scorer.CLIENT_RETRY_FOR_S", 0.0)
    job = a_job(write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    with pytest.raises(BulkError, match=r"http://127\.0\.0\.1:9"):
        run_urls(job, ["http://127.0.0.1:9"])
