"""Numbers that JSON cannot carry never reach an answer; likeliest ids with probability 0 are left out of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import httpx2
import numpy as np
import orjson
import pytest
from dense_reward.engines.fake import FakeEngine, FakeTeacher, FakeTokenizer
from dense_reward.records import Cost, EngineInfo, Scores, Teacher, TeacherScores, TokenScores, Trunk, Wants, Work
from dense_reward.serving.loaders import LoadedPair
from dense_reward.teacher.questions import TokenSequence
from dense_reward.teacher.vllm import prompt_logprobs
from dense_reward.text.encode import Encoder
from running_service import served

IDS = [7, 3, 250, 9]
ASKED = {"prompt": [[1, 2], IDS], "max_tokens": 1, "prompt_logprobs": 2}
Change = Callable[[TeacherScores], TeacherScores]


@dataclass(frozen=True, slots=True)
class Changed:
    """A fake teacher whose log-probs of a sequence of three scored tokens are changed."""

    engine: FakeTeacher
    change: Change

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def cost(self, trunk: Trunk) -> Cost:
        return self.engine.cost(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        def work() -> Scores:
            return [[self._changed(scores) for scores in of_trunk] for of_trunk in self.engine.prepare(trunks, wants)()]

        return work

    def _changed(self, scores: TokenScores) -> TokenScores:
        taught = scores.teacher
        return scores if taught is None or scores.tokens != 3 else replace(scores, teacher=self.change(taught))


def answered(change: Change, route: str = "/v1/completions", body: object = ASKED) -> httpx2.Response:
    def load(*_: object) -> LoadedPair:
        engine = FakeEngine()

        def taught_by(teacher: Teacher) -> Changed:
            return Changed(FakeTeacher(engine, teacher), change)

        return LoadedPair(engine, Encoder.of(FakeTokenizer(), "plain"), "fake", taught_by=taught_by)

    with served(load) as running:
        response: httpx2.Response = running.client.post(route, json=body)
        return response


def error_of(response: httpx2.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["logprob_S", "top_logprob_SK"])
def test_a_number_that_is_not_finite_is_an_error_with_the_cure(field: str, value: float) -> None:
    def spoilt(scores: TeacherScores) -> TeacherScores:
        array = getattr(scores, field).copy()
        array.flat[-1] = value
        return replace(scores, **{field: array})

    status, code, message = error_of(answered(spoilt))
    assert (status, code) == (500, "non_finite")
    assert "sequence 1: " in message
    assert "--dtype" in message


def test_a_token_with_probability_0_is_refused_with_its_place() -> None:
    def impossible(scores: TeacherScores) -> TeacherScores:
        return replace(scores, logprob_S=np.array([-1, -np.inf, -2], dtype=np.float32))

    status, code, message = error_of(answered(impossible))
    assert (status, code) == (400, "invalid_request")
    assert message.startswith("sequence 1, position 2: an id that is asked for has probability 0")


def test_a_requested_id_with_probability_0_is_refused_with_its_place() -> None:
    def impossible(scores: TeacherScores) -> TeacherScores:
        assert scores.candidate_logprob_SK is not None
        candidates_SK = scores.candidate_logprob_SK.copy()
        candidates_SK[2, 1] = -np.inf
        return replace(scores, candidate_logprob_SK=candidates_SK)

    body = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": [5, 6],
    }
    status, _, message = error_of(answered(impossible, "/generate", body))
    assert status == 400
    assert "sequence 0, position 3" in message


def test_a_likeliest_id_with_probability_0_is_left_out() -> None:
    def short(scores: TeacherScores) -> TeacherScores:
        top_SK = scores.top_logprob_SK.copy()
        top_SK[:, 1] = -np.inf
        return replace(scores, top_logprob_SK=top_SK)

    response = answered(short)
    assert response.status_code == 200
    assert "Infinity" not in response.text
    rows = json.loads(response.text)["choices"][1]["prompt_logprobs"]
    assert [len(row) for row in rows[1:]] == [2, 2, 2]  # the token itself and the likeliest


def test_ranks_differ_where_log_probs_are_equal() -> None:
    scores = TeacherScores(
        logprob_S=np.full(2, -1.5, dtype=np.float32),
        rank_S=np.array([1, 1], dtype=np.int32),  # no id is likelier
        top_ids_SK=np.array([[4, 5], [4, 9]], dtype=np.int32),
        top_logprob_SK=np.full((2, 2), -1.5, dtype=np.float32),
        candidate_logprob_SK=None,
        next_id=0,
        next_logprob=0.0,
    )
    sequence = TokenSequence(np.array([1, 8, 9], dtype=np.int32), 1)
    first, outside, inside = json.loads(orjson.dumps(prompt_logprobs(sequence, scores)))
    assert first is None
    assert [(token, entry["rank"]) for token, entry in outside.items()] == [("8", 3), ("4", 1), ("5", 2)]
    assert [(token, entry["rank"]) for token, entry in inside.items()] == [("9", 2), ("4", 1)]
