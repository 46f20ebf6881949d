"""What the client reads is what the OpenAPI document describes."""

import json
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import httpx2
import pytest
from dense_reward import Client, ClientError, ScoringError
from dense_reward.client import responses, results, scored_response
from dense_reward.client.errors import ItemError
from dense_reward.http.openapi import answers
from dense_reward.http.openapi.examples import Example, examples
from dense_reward.schemas import ArrayName

RETRIED = {408, 429, 503}


@pytest.mark.parametrize(
    ("of_client", "described"),
    [
        (results.ServedModel, answers.ScoredBy),
        (results.Usage, answers.Usage),
        (results.Timing, answers.Timing),
        (scored_response.Alternative, answers.Alternative),
    ],
)
def test_records_have_the_same_fields_and_types(of_client: type, described: type) -> None:
    assert get_type_hints(of_client) == get_type_hints(described)


def test_results_have_the_same_fields() -> None:
    names = {*get_type_hints(answers.ScoredResponse), *get_type_hints(answers.FailedItem)}
    assert set(get_type_hints(scored_response.ScoredResponse)) == names
    assert set(get_type_hints(responses._WireResult)) - {"model_config"} == names
    assert set(get_type_hints(results.Scored)) == set(get_type_hints(answers.ScoreAnswer)) - {"wire_version"}
    assert set(get_type_hints(ItemError)) == set(get_type_hints(answers.ItemFault))


def test_the_client_decodes_the_arrays_that_can_be_base64() -> None:
    described = get_type_hints(answers.ScoredResponse)
    encoded = {
        name for name, kind in described.items() if get_origin(kind) in {Union, UnionType} and str in get_args(kind)
    }
    assert responses.WIRE_DTYPES.keys() == encoded
    assert set(get_args(ArrayName)) <= described.keys()


@pytest.mark.parametrize("one", [one for one in examples() if one.code], ids=lambda one: one.name)
def test_the_client_raises_the_error_of_each_example(one: Example) -> None:
    transport = httpx2.MockTransport(lambda _: httpx2.Response(one.status, content=json.dumps(one.answer).encode()))
    with Client("http://service", transport=transport, retry_for_s=0) as client, pytest.raises(ClientError) as raised:
        client.models()
    if isinstance(raised.value, ScoringError):
        found = raised.value.code, raised.value.status, raised.value.request_id
        assert found == (one.code, one.status, "example")
    else:
        assert one.status in RETRIED
        assert str(one.code) in str(raised.value)
