"""Parsing an answer: the same arrays from either encoding, and an error for any wrong answer."""

import base64
import json
from collections.abc import Sequence

import numpy as np
import pytest
from dense_reward.client.errors import AlignmentError, AnswerError
from dense_reward.client.responses import Expectation, Expected, parse_cards, parse_scored
from dense_reward.client.results import padded
from dense_reward.client.scored_response import ScoredResponse
from hypothesis import given
from hypothesis import strategies as st

FRAME = {
    "id": "a",
    "model": {"name": "m", "sft": "s", "reference": "r", "tokenizer_sha256": "t", "revision": "v", "related": True}
    | {"from_the_future": 1},
    "usage": {"prompt_tokens": 1, "response_tokens": 2, "scored_tokens": 2},
    "timing": {"encode_s": 0.0, "queue_s": 0.0, "compute_s": 0.0, "describe_s": 0.0, "total_s": 0.0},
}
FLOATS = ("reward", "kl")
Row = dict[str, object]
SENT = Expected(0, 0, np.array([5, 6]))


def row(**changes: object) -> Row:
    two = {"item": 0, "response": 0, "length": 2, "sum": 3.0, "mean": 1.5, "min": 1.0, "token_ids": [5, 6]}
    return two | {"reward": [1.0, 2.0]} | changes


def parse(
    rows: Sequence[Row], expected: Sequence[Expected] = (SENT,), required: Sequence[str] = ("reward", "token_ids")
) -> tuple[ScoredResponse, ...]:
    body = json.dumps({**FRAME, "results": list(rows)}).encode()
    return parse_scored(body, Expectation(tuple(expected), frozenset(required))).results


def packed(values: object, dtype: str) -> str:
    return base64.b64encode(np.array(values, dtype=dtype).tobytes()).decode()


float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
id_lists = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@given(st.lists(id_lists, min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_either_encoding_gives_the_numbers_that_were_written(
    responses: list[list[int]], width: int, data: st.DataObject
) -> None:
    lists: list[Row] = []
    strings: list[Row] = []
    expected: list[Expected] = []
    for g, ids in enumerate(responses):
        size = len(ids)
        floats = data.draw(st.lists(float32s, min_size=size, max_size=size))
        matrix = data.draw(st.lists(st.lists(float32s, min_size=width, max_size=width), min_size=size, max_size=size))
        spans = [[i, i + 1] for i in range(size)]
        summary: Row = {"item": 0, "response": g, "length": size, "sum": 0.0, "mean": None, "min": None}
        lists.append(summary | {"token_ids": ids, "reward": floats, "candidate_reward": matrix, "offsets": spans})
        strings.append(
            summary
            | {"token_ids": packed(ids, "<i4"), "offsets": packed(spans, "<i4")}
            | {"reward": packed(floats, "<f4"), "candidate_reward": packed(matrix, "<f4")}
        )
        expected.append(Expected(0, g, np.array(ids, dtype=np.int64), candidates=width))
        for result in (parse(lists, expected)[g], parse(strings, expected)[g]):
            assert result.reward is not None
            np.testing.assert_array_equal(result.reward, np.array(floats, dtype=np.float32))
            assert result.candidate_reward is not None
            np.testing.assert_array_equal(
                result.candidate_reward, np.array(matrix, dtype=np.float32).reshape(size, width)
            )
            assert result.offsets is not None
            assert result.offsets.tolist() == spans
            assert result.token_ids is not None
            assert result.token_ids.tolist() == ids


def test_arrays_are_the_callers_to_change() -> None:
    (result,) = parse([row(reward=packed([1.0, 2.0], "<f4"))])
    assert result.reward is not None
    result.reward[0] = 7.0
    assert result.reward.dtype == np.dtype(np.float32)
    assert result.reward.tolist() == [7.0, 2.0]


@pytest.mark.parametrize(
    "wrong",
    [
        row(reward=[1.0]),
        row(reward=[1.0, 2.0, 3.0]),
        row(reward=packed([1.0], "<f4")),
        row(token_ids=[5, 7]),
        row(token_ids=[6, 5]),
        row(length=1, reward=[1.0], token_ids=[5]),
        row(item=1),
        row(response=1),
        row(tokens=["a"]),
        row(alternatives=[[]]),
        row(offsets=[[0, 1]]),
        row(kl=[0.0]),
    ],
)
def test_what_belongs_to_other_tokens_is_refused(wrong: Row) -> None:
    with pytest.raises(AlignmentError):
        parse([wrong])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(reward=None), "reward was requested"),
        (row(token_ids=None), "token_ids was requested"),
        (row(reward=[1.0, float("nan")]), "not finite"),
        (row(reward=[1.0, float("-inf")]), "not finite"),
        (row(reward=[1.0, 1e300]), "not finite"),
        (row(reward=packed([1.0, np.nan], "<f4")), "not finite"),
        (row(sum=float("nan")), "finite number"),
        (row(reward="!!!!"), "not base64"),
        (row(reward="AAA="), "cannot be read"),
        (row(token_ids=[5, 2**40]), "token_ids cannot be read"),
        (row(sum=None), "no sum"),
        (row(length=None), "no length"),
        (row(reward=[1.0, None]), "not an answer of a dense-reward service"),
    ],
)
def test_what_cannot_be_trusted_is_refused(wrong: Row, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        parse([wrong])


def test_a_transposed_matrix_is_not_taken_for_the_right_one() -> None:
    transposed = row(candidate_reward=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with pytest.raises(AlignmentError, match=r"shape \[3, 2\], it must be \[2, 3\]"):
        parse([transposed], [Expected(0, 0, candidates=3)])


@pytest.mark.parametrize("missing", [Expected(0, 0, candidates=1), Expected(0, 0, segments=1)])
def test_candidates_and_segments_that_were_asked_for_must_come(missing: Expected) -> None:
    with pytest.raises(AnswerError, match="was requested but is not in the answer"):
        parse([row()], [missing])


def test_log_probs_of_candidates_must_come_for_those_who_named_some_and_asked() -> None:
    asked = ["reward", "candidate_sft_logprob"]
    with pytest.raises(AnswerError, match="candidate_sft_logprob was requested but is not in the answer"):
        parse([row(candidate_reward=[[1.0], [2.0]])], [Expected(0, 0, candidates=1)], asked)
    (unnamed,) = parse([row()], [Expected(0, 0)], asked)
    assert unnamed.candidate_sft_logprob is None


@pytest.mark.parametrize("rows", [[], [row(), row(response=1)], [row(), row()]])
def test_one_result_comes_for_each_response(rows: list[Row]) -> None:
    with pytest.raises(AlignmentError, match="requested 1 responses and received"):
        parse(rows)


def test_an_error_of_an_item_that_was_not_sent_is_refused() -> None:
    bad = {"item": 3, "error": {"code": "too_long", "message": "long"}}
    body = json.dumps({**FRAME, "results": [row(), bad]}).encode()
    with pytest.raises(AlignmentError):
        parse_scored(body, Expectation((SENT,), frozenset(), may_fail=True))


def test_a_listing_without_models_is_no_listing() -> None:
    with pytest.raises(AnswerError, match="not a list of models"):
        parse_cards(b'{"data": []}')
    with pytest.raises(AnswerError, match="not a list of models"):
        parse_cards(b'{"models": [{"name": "lonely"}]}')


@given(st.lists(st.lists(float32s, max_size=5), min_size=1, max_size=4))
def test_padding_keeps_every_value_and_adds_only_zeros(responses: list[list[float]]) -> None:
    rows = [
        {"item": 0, "response": g, "length": len(values), "sum": 0.0, "reward": values}
        for g, values in enumerate(responses)
    ]
    expected = tuple(Expected(0, g) for g in range(len(responses)))
    body = json.dumps({**FRAME, "results": rows}).encode()
    values_GT, mask_GT = padded(parse_scored(body, Expectation(expected, frozenset())))
    assert values_GT.shape == (len(responses), max(len(values) for values in responses))
    for values, padded_T, mask_T in zip(responses, values_GT, mask_GT, strict=True):
        np.testing.assert_array_equal(padded_T[mask_T], np.array(values, dtype=np.float32))
        assert mask_T.tolist() == [t < len(values) for t in range(values_GT.shape[1])]
        assert not padded_T[~mask_T].any()
