"""Which requests are valid, parsed from JSON as it arrives over HTTP."""

import json

import pytest
from dense_reward.schemas import HeatmapRequest, ScoreRequest
from pydantic import ValidationError

PROMPT = {"prompt": "a", "response": "b"}
FORMS: dict[str, dict[str, object]] = {
    "prompt": {"prompt": "a", "responses": ["b", ""]},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "ids": {"prompt_ids": [1], "response_ids": [[2, 3], []]},
    "stream": {"token_ids": [1, 2], "score_mask": [0, 1]},
    "text": {"text": "a"},
}


def parsed(**body: object) -> ScoreRequest:
    return ScoreRequest.model_validate_json(json.dumps(body))


def refused(body: str) -> str:
    """The place of the first fault."""
    with pytest.raises(ValidationError) as error:
        HeatmapRequest.model_validate_json(body)
    return ".".join(str(part) for part in error.value.errors()[0]["loc"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised_alone_and_in_a_batch(form: str) -> None:
    alone = parsed(**FORMS[form])
    assert alone.form == form
    assert alone.listed() == [alone]
    batch = parsed(items=[FORMS[form], PROMPT])
    assert [item.form for item in batch.listed()] == [form, "prompt"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_two_forms_at_once_are_refused(form: str, other: str) -> None:
    if form != other:
        assert refused(json.dumps(FORMS[form] | FORMS[other])) == ""


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a"},
        {"response": "b"},
        {"responses": ["b"]},
        {**PROMPT, "responses": ["c"]},
        {"prompt_ids": [1]},
        {"response_ids": [[1]]},
        {"token_ids": [1]},
        {"token_ids": [1, 2], "score_mask": [0]},
        {"score": "last"},
        {"tools": []},
        {"candidate_ids": [[[1]]]},
        {"gamma": 0.5},
        {"text": None},
    ],
)
def test_half_a_form_is_refused(body: dict[str, object]) -> None:
    assert refused(json.dumps(body)) == ""


def test_null_is_the_same_as_nothing() -> None:
    nulls: dict[str, object] = {"text": None, "messages": None, "responses": None, "items": None, "candidate_ids": None}
    assert parsed(**PROMPT, **nulls).form == "prompt"
    nulls["items"] = [PROMPT]
    assert [item.form for item in parsed(**nulls).listed()] == ["prompt"]


@pytest.mark.parametrize("extra", [PROMPT, {"text": "a"}, {"candidate_ids": [[[1]]]}, {"segments": [[[0, 1]]]}])
def test_a_batch_takes_no_other_input(extra: dict[str, object]) -> None:
    assert refused(json.dumps({"items": [PROMPT], **extra})) == ""


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({**PROMPT, "temperature": 1}, "temperature"),
        ({"items": [{**PROMPT, "gamma": 1}]}, "items.0.gamma"),
        ({"items": [PROMPT, {"items": [PROMPT]}]}, "items.1.items"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages.0.weight"),
        ({"items": []}, "items"),
        ({"prompt": "a", "responses": []}, "responses"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content.str"),
        ({"prompt_ids": [1], "response_ids": []}, "response_ids"),
        ({"prompt_ids": [1], "response_ids": [1]}, "response_ids.0"),
        ({"prompt": 1, "response": "b"}, "prompt"),
        ({"token_ids": [1, 2], "score_mask": [0, 2]}, "score_mask.1"),
        ({"text": "a", "segments": [[[0]]]}, "segments.0.0.1"),
        ({"text": "a", "segments": [[[0, 1, 2]]]}, "segments.0.0"),
    ],
)
def test_unknown_keys_and_wrong_shapes_are_refused_with_their_place(body: dict[str, object], where: str) -> None:
    assert refused(json.dumps(body)) == where


@pytest.mark.parametrize("number", ["true", "1.0", "1.5", '"1"', "null", "1e0", "NaN"])
@pytest.mark.parametrize(
    "template",
    [
        '{"prompt_ids": [0, %s], "response_ids": [[1]]}',
        '{"prompt_ids": [0], "response_ids": [[1], [0, %s]]}',
        '{"token_ids": [0, %s], "score_mask": [0, 1]}',
        '{"token_ids": [1, 2], "score_mask": [0, %s]}',
        '{"text": "a", "candidate_ids": [[[0, %s]]]}',
        '{"text": "a", "segments": [[[0, %s]]]}',
        '{"text": "a", "top_k": %s}',
    ],
)
def test_only_integers_are_ids(number: str, template: str) -> None:
    where = refused(template.replace("%s", number))
    assert where.split(".")[0] in template


@pytest.mark.parametrize("huge", [2**31, 2**63, 2**64, 10**30, -1, -(2**70)])
def test_ids_of_any_size_are_read_so_that_the_vocabulary_can_refuse_them(huge: int) -> None:
    assert parsed(prompt_ids=[huge], response_ids=[[huge]]).prompt_ids == [huge]


@pytest.mark.parametrize("gamma", ["NaN", "Infinity", "-0.1", "1.1", "true", '"1"'])
def test_gamma_is_a_number_from_0_to_1(gamma: str) -> None:
    assert refused(f'{{"text": "a", "gamma": {gamma}}}') == "gamma"


def test_gamma_may_be_written_as_an_integer() -> None:
    assert [parsed(text="a", gamma=gamma).gamma for gamma in (0, 0.5, 1)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("add_eos", 1),
        ("add_eos", "yes"),
        ("compare", "no"),
        ("top_k", 21),
        ("top_k", -1),
        ("signal", "kl"),
        ("render", "plain"),
        ("include", ["advantage"]),
        ("include", "reward"),
        ("encoding_format", "hex"),
        ("on_error", "skip"),
        ("format", "png"),
    ],
)
def test_an_option_outside_its_values_is_refused(option: str, value: object) -> None:
    assert refused(json.dumps({"text": "a", option: value})).startswith(option)


def test_without_options_the_reward_is_asked_for_as_numbers() -> None:
    asked = parsed(text="a")
    assert (asked.signal, asked.gamma, asked.top_k, asked.include) == ("reward", 1.0, 0, None)
    assert (asked.encoding_format, asked.on_error, asked.render, asked.add_eos) == ("float", "fail", None, None)
