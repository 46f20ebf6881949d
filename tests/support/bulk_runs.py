"""Bulk scoring in this process with the fake engine, or with a scorer of a test."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dense_reward.bulk.columns import Columns
from dense_reward.bulk.job import Job, Writing, opened, score
from dense_reward.bulk.local_scorer import LocalScorer, ScoreTerms
from dense_reward.bulk.records import Outcome, Scorer
from dense_reward.bulk.sources import open_source
from dense_reward.bulk.windows import Shard
from dense_reward.engines.fake import FakeEngine, FakeTokenizer
from dense_reward.records import Branch, Trunk, Wants
from dense_reward.schemas import Item
from dense_reward.settings import read_settings

TERMS = ScoreTerms()
Json = dict[str, Any]


def rows_of(out: Path) -> list[Json]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def write_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def sums_file(folder: Path, count: int) -> Path:
    """Rows of prompt and response that are all different."""
    return write_rows(folder / "in.jsonl", [{"prompt": f"{n}+1", "response": f"{n + 1}"} for n in range(count)])


def a_job(
    source: Path | str,
    out: Path,
    mapping: Mapping[str, str] | None = None,
    *,
    on_error: Literal["fail", "keep"] = "fail",
    shard: Shard | None = None,
    terms: ScoreTerms = TERMS,
) -> Job:
    columns = Columns(mapping or {}, "last", terms.columns)
    return Job(open_source(str(source)), out, columns, {"columns": mapping or {}}, shard or Shard(), on_error)


class FakeScorer:
    """The fake engine without a service: windows of few rows, and a fault at the n-th item if a test wants one."""

    parallel = 2
    characters = 100

    def __init__(self, fails_at: int | None = None, error: Exception | None = None, revision: str = "fake") -> None:
        self._fails_at, self._error, self.seen = fails_at, error, 0
        self.identity = {"model": "default", "revision": revision, "tokenizer_sha256": "fake"}

    async def score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        self.seen += len(items)
        if self._fails_at is not None and self.seen > self._fails_at and self._error is not None:
            raise self._error
        return [[scores_of(item)] for item in items], 7

    async def close(self) -> None:
        """It holds nothing."""


def scores_of(item: Item) -> Json:
    reward = expected_reward(item)
    return {"reward": reward, "tokens": list(item.response or ""), "length": len(reward)}


def expected_reward(item: Item) -> list[float]:
    """The rewards that the fake engine gives to a prompt and a response without end of turn."""
    tokenizer = FakeTokenizer()
    encoded = tokenizer.encode(item.response or "", special=False).ids
    prompt = tokenizer.encode(item.prompt or "", special=False).ids
    from numpy import array, int32, ones  # noqa: PLC0415

    trunk = Trunk(array(prompt, int32), (Branch(array(encoded, int32), ones(len(encoded), bool)),))
    scores = FakeEngine().score([trunk], Wants())[0][0]
    found: list[float] = (scores.sft_logprob_S - scores.reference_logprob_S).tolist()
    return found


def run(job: Job, scorer: Scorer) -> Writing:
    """Score with a scorer of the test."""
    with opened(job, lambda rows, tokens: None) as writer:
        asyncio.run(score(writer, scorer))
    return writer


def run_fake(job: Job, terms: ScoreTerms = TERMS) -> Writing:
    """Score with the fake engine, through the same service as the command."""

    async def whole(writer: Writing) -> None:
        scorer = LocalScorer(read_settings({"engine": "fake"}, ()), terms)
        await scorer.start()
        try:
            await score(writer, scorer)
        finally:
            await scorer.close()

    with opened(job, lambda rows, tokens: None) as writer:
        asyncio.run(whole(writer))
    return writer
