"""vLLM's JSON of log-probs, joined from bytes, is that of the objects that it stands for."""

import json

import numpy as np
import pytest
from dense_reward.records import TeacherScores
from dense_reward.teacher.entries import entries_json

TOKENS, VOCABULARY = 40, 30


def scores_of(ids_S: list[int], k: int, impossible: int) -> TeacherScores:
    """Random distributions, some of whose last likeliest ids have probability 0."""
    random = np.random.default_rng(k)
    logprob_SV = random.integers(-9, 0, (TOKENS, VOCABULARY)).astype(np.float32) / np.float32(3)  # with ties
    order_SV = np.argsort(-logprob_SV, axis=1, kind="stable")
    own_S = logprob_SV[np.arange(TOKENS), ids_S]
    top_SK = np.take_along_axis(logprob_SV, order_SV, axis=1)[:, :k]
    top_SK[::3, max(0, k - impossible) :] = -np.inf
    rank_S = 1 + (logprob_SV > own_S[:, None]).sum(axis=1)
    return TeacherScores(
        own_S, rank_S.astype(np.int32), order_SV[:, :k].astype(np.int32), top_SK, None, next_id=0, next_logprob=0.0
    )


def expected(token: int, scores: TeacherScores, at: int) -> list[tuple[str, dict[str, float]]]:
    """The entries of a token in order, by definition."""
    top = zip(scores.top_ids_SK[at].tolist(), scores.top_logprob_SK[at].tolist(), strict=True)
    entries = {
        str(one): {"logprob": value, "rank": place}
        for place, (one, value) in enumerate(top, start=1)
        if value > -np.inf
    }
    outside = {
        "logprob": float(scores.logprob_S[at]),
        "rank": max(int(scores.rank_S[at]), scores.top_ids_SK.shape[1] + 1),
    }
    itself = {str(token): entries.get(str(token), outside)}
    return list((itself | entries).items())


@pytest.mark.parametrize("k", [0, 1, 2, 7, VOCABULARY])
@pytest.mark.parametrize("part", [1, 20, 16_384])
def test_each_token_has_its_entries_in_order(k: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_reward.teacher.entries.PART_ENTRIES", part)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, TOKENS).tolist()
    scores = scores_of(ids, k, impossible=0 if k == VOCABULARY else 1)
    found = [json.loads(entry) for entry in entries_json(np.array(ids, dtype=np.int32), scores)]
    assert len(found) == TOKENS
    for at, token in enumerate(ids):
        wanted = expected(token, scores, at)
        assert list(found[at]) == [name for name, _ in wanted]
        for name, entry in wanted:
            assert found[at][name]["rank"] == entry["rank"]
            assert np.float32(found[at][name]["logprob"]) == np.float32(entry["logprob"])
