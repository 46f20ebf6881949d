"""Requests of a client: the service's schema accepts them, and invalid arguments raise."""

import json

import numpy as np
import pytest
import torch
from dense_reward.client import requests
from dense_reward.client.requests import DEFAULTS, ScoreOptions
from dense_reward.schemas import HeatmapRequest, Options, ScoreRequest
from hypothesis import given
from hypothesis import strategies as st

ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)


def sent(item: requests.ItemToScore, options: ScoreOptions = DEFAULTS) -> dict[str, object]:
    body: dict[str, object] = json.loads(requests.score_one(item, options, "base64").call.body or b"")
    return body


def test_options_are_those_of_the_schema_with_its_defaults() -> None:
    schema = {name: field.default for name, field in Options.model_fields.items()}
    schema["include"] = ScoreRequest.model_fields["include"].default
    assert {name: getattr(DEFAULTS, name) for name in DEFAULTS.__slots__} == schema


def test_only_options_that_say_something_are_sent() -> None:
    assert sent({"text": "a"}) == {"text": "a", "encoding_format": "base64"}
    options = ScoreOptions(gamma=0.5, include=("kl",), expect_revision="r")
    assert sent({"text": "a"}, options) == {
        "text": "a",
        "encoding_format": "base64",
        "gamma": 0.5,
        "include": ["kl"],
        "expect_revision": "r",
    }


@given(ids, st.lists(ids, min_size=1, max_size=3), st.integers(0, 3))
def test_the_schema_accepts_ids_in_lists_arrays_and_tensors(
    prompt: list[int], responses: list[list[int]], width: int
) -> None:
    item = {
        "prompt_ids": prompt,
        "response_ids": responses,
        "candidate_ids": [[[1] * width] * len(response) for response in responses],
    }
    for made in (np.array, torch.tensor, list):
        forms: requests.ItemToScore = {
            "prompt_ids": made(prompt) if prompt else [],
            "response_ids": [made(response) if response else [] for response in responses],
            "candidate_ids": [made([[1] * width] * len(r)) if r and width else [[]] * len(r) for r in responses],
        }
        call = requests.score_one(forms, DEFAULTS, "base64")
        assert call.call == requests.score_one(item, DEFAULTS, "base64").call
        assert ScoreRequest.model_validate_json(call.call.body or b"").response_ids == responses
        for expected, response in zip(call.expectation.responses, responses, strict=True):
            assert expected.ids_T is not None
            assert expected.ids_T.tolist() == response
            assert expected.candidates == (width if response else 0)


def test_empty_arrays_are_empty_lists_whatever_their_type() -> None:
    item = {"prompt_ids": np.array([1]), "response_ids": [np.array([])], "candidate_ids": [np.zeros((0, 3))]}
    assert sent(item) == {
        "prompt_ids": [1],
        "response_ids": [[]],
        "candidate_ids": [[]],
        "encoding_format": "base64",
    }


def test_ids_are_always_answered_with_their_rewards() -> None:
    item = {"prompt_ids": [1], "response_ids": [[2]]}
    call = requests.score_one(item, ScoreOptions(include=["kl", "text", "offsets"]), "float")
    assert json.loads(call.call.body or b"")["include"] == ["kl", "text", "offsets", "token_ids"]
    assert call.expectation.required == {"kl", "token_ids"}
    assert requests.score_one(item, DEFAULTS, "float").expectation.required == {"reward", "token_ids"}


def test_a_heatmap_request_is_what_the_schema_takes() -> None:
    call = requests.heatmap([{"text": "a"}], ScoreOptions(signal="centred"), "ansi", None, compare=False)
    request = HeatmapRequest.model_validate_json(call.body or b"")
    assert (request.format, request.compare, request.signal) == ("ansi", False, "centred")
    assert request.palette == HeatmapRequest.model_fields["palette"].default


def test_text_is_sent_as_it_is() -> None:
    text = '数学 👩‍🔬 \x00 "quoted"'
    assert sent({"text": text})["text"] == text


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt_ids": [1], "response_ids": [[1.5]]}, r"response_ids\[0\] must hold integers; it holds float64"),
        ({"prompt_ids": [1], "response_ids": [[1, float("nan")]]}, "must hold integers"),
        ({"prompt_ids": np.array([1.0]), "response_ids": [[1]]}, "arrays in a request must be integers"),
        ({"prompt_ids": [1], "response_ids": [["a"]]}, "must hold integers"),
        ({"prompt_ids": [1], "response_ids": "abc"}, "response_ids must be a list with one entry per response"),
        ({"prompt_ids": [1], "response_ids": [[2**70]]}, "must hold integers"),
        ({"text": {1, 2}}, "set of object cannot be sent"),
    ],
)
def test_what_is_no_id_raises_a_type_error(item: requests.ItemToScore, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sent(item)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt_ids": [float("nan")], "response_ids": [[1]]}, "no NaN"),
        ({"prompt_ids": [1], "response_ids": [1, 2]}, r"response_ids\[0\] must have 1 dimension\(s\); it has 0"),
        ({"prompt_ids": [1], "response_ids": [[[1]]]}, "must have 1 dimension"),
        ({"prompt_ids": [1], "response_ids": [[1, [2]]]}, "different lengths"),
        (
            {"prompt_ids": [1], "response_ids": [[1]], "candidate_ids": []},
            "candidate_ids has 0 entries for 1 responses",
        ),
        ({"prompt_ids": [1], "response_ids": [[1]], "segments": [[], []]}, "segments has 2 entries for 1 responses"),
        ({"prompt_ids": [1], "response_ids": [[1]], "candidate_ids": [[1]]}, "must have 2 dimension"),
        ({"token_ids": [1, 2], "score_mask": [0]}, r"2 token_ids, but a score_mask of shape \[1\]"),
        ({"text": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_has_the_wrong_shape_raises_a_value_error(item: requests.ItemToScore, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sent(item)


def test_nan_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="no NaN"):
        sent({"text": "a"}, ScoreOptions(gamma=float("nan")))
