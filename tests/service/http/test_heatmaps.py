"""POST /heatmap: its rows, its pictures, and the options that it refuses."""

import re
from itertools import pairwise

import pytest
from dense_reward.engines.fake import EOS_ID, VOCABULARY, FakeEngine, FakeTokenizer
from dense_reward.errors import RequestError
from dense_reward.heatmap import HeatmapRow
from dense_reward.http.heatmaps import (
    ARRAYS,
    DETAILS,
    FROM_DISTRIBUTIONS,
    MEDIA_TYPES,
    draw,
    heatmap_rows,
    prompt_shown,
    with_arrays,
)
from dense_reward.schemas import HeatmapRequest, SignalName
from dense_reward.scoring.items import Limits, prepare
from dense_reward.scoring.rows import Row, RowBuilder, wants
from dense_reward.text.encode import Encoder

TOKENIZER = FakeTokenizer()
LIMITS = Limits(VOCABULARY, max_length_tokens=200, max_responses=8, max_json_depth=9)
TEXT: dict[str, object] = {"prompt": "2+2=", "responses": ["4☃", "5"]}
IDS: dict[str, object] = {"prompt_ids": [*b"hi"], "response_ids": [[*"☃".encode(), EOS_ID], []]}
CHAT: dict[str, object] = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
STREAM: dict[str, object] = {"token_ids": [*b"abcd"], "score_mask": [0, 0, 1, 1]}


def scored(**body: object) -> tuple[HeatmapRequest, list[Row]]:
    """A request and the rows of its answer, made like the service makes them."""
    request = with_arrays(HeatmapRequest.model_validate(body), FROM_DISTRIBUTIONS)
    encoder = Encoder(TOKENIZER, "chat", EOS_ID)
    items = [prepare(item, request, encoder, LIMITS) for item in request.listed()]
    scores = FakeEngine().score([item.trunk for item in items], wants(request))
    builder = RowBuilder(request, TOKENIZER)
    answers = zip(items, scores, strict=True)
    return request, [row for i, (item, of_item) in enumerate(answers) for row in builder.rows(i, item, of_item)]


def drawn_rows(**body: object) -> list[HeatmapRow]:
    request, rows = scored(**body)
    return heatmap_rows(request, rows, TOKENIZER)


def picture(**body: object) -> str:
    request, rows = scored(**body)
    return draw(request, rows, TOKENIZER)


def refusal(**body: object) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as refused:
        with_arrays(HeatmapRequest.model_validate(body), FROM_DISTRIBUTIONS)
    return refused.value.code, refused.value.faults[0].param


@pytest.mark.parametrize(
    ("body", "prompt", "pieces"),
    [
        (TEXT, "2+2=", [("4", "", "", "☃", "<eos>"), ("5", "<eos>")]),
        (TEXT | {"add_eos": False}, "2+2=", [("4", "", "", "☃"), ("5",)]),
        (IDS, "hi", [("", "", "☃", "<eos>"), ()]),
        (CHAT, "user: a\nassistant: b\nuser: c", [("d", "<eos>")]),
        (CHAT | {"score": "all_assistant"}, "user: a\nassistant: b\nuser: c", [("b", "<eos>", "d", "<eos>")]),
        (STREAM, "ab", [("c", "d")]),
        ({"token_ids": [*b"ab"], "score_mask": [0, 0]}, "ab", [()]),
        ({"text": "hi"}, "", [("h", "i")]),
        ({"text": "h<eos>", "render": "raw"}, "", [("h", "<eos>")]),
        ({"prompt_ids": [1], "response_ids": [[0xE2, 0x98]]}, "\x01", [("", "\ufffd")]),
    ],
)
def test_rows_show_the_prompt_and_a_piece_per_scored_token(
    body: dict[str, object], prompt: str, pieces: list[tuple[str, ...]]
) -> None:
    rows = drawn_rows(**body)
    assert [row.pieces for row in rows] == pieces
    assert {row.prompt for row in rows} == {prompt}
    for row in rows:
        assert len(row.token_ids) == len(row.values) == len(row.pieces)


@pytest.mark.parametrize("signal", ["reward", "centred", "sft_logprob"])
def test_rows_hold_the_chosen_signal_and_all_other_quantities_for_tooltips(signal: SignalName) -> None:
    request, answers = scored(**TEXT, signal=signal)
    for row, answer in zip(heatmap_rows(request, answers, TOKENIZER), answers, strict=True):
        assert row.values == row.details[signal]
        assert sum(row.values) == pytest.approx(answer["sum"])
        assert set(row.details) == set(DETAILS)


def test_rows_of_several_responses_are_numbered() -> None:
    assert [row.title for row in drawn_rows(**TEXT)] == ["response 1", "response 2"]
    assert [row.title for row in drawn_rows(**STREAM)] == ["response"]


def test_rows_of_several_items_name_their_items() -> None:
    assert [row.title for row in drawn_rows(items=[TEXT, STREAM])] == [
        "item 1, response 1",
        "item 1, response 2",
        "item 2, response 1",
    ]


def test_thoughts_calls_and_parts_of_earlier_turns_are_shown_as_people_read_them() -> None:
    arguments = '{"city": "Oslo"}'
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    inner = {"name": "time", "arguments": {"zone": 1}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Oslo"}, {"type": "text", "text": "now?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "I need a tool.", "tool_calls": [call, inner]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "assistant", "content": "ok"},
    ]
    item = HeatmapRequest.model_validate({"messages": messages})
    assert prompt_shown(item, TOKENIZER).splitlines() == [
        "user: Oslo",
        "now?",
        "assistant thinks: I need a tool.",
        f"assistant calls: weather({arguments})",
        'assistant calls: time({"zone": 1})',
        "tool: ",
    ]


def test_each_row_of_a_batch_has_the_prompt_of_its_own_item() -> None:
    rows = drawn_rows(items=[TEXT, STREAM, {"text": "hi"}])
    assert [row.prompt for row in rows] == ["2+2=", "2+2=", "ab", ""]


def test_alternatives_are_drawn_where_they_are_asked_for() -> None:
    assert all(row.alternatives is None for row in drawn_rows(**TEXT))
    for row in drawn_rows(**TEXT, top_k=3):
        assert row.alternatives is not None
        assert [len(of_token) for of_token in row.alternatives] == [3] * len(row.pieces)
        for of_token in row.alternatives:
            assert all(better.logprob >= worse.logprob for better, worse in pairwise(of_token))


@pytest.mark.parametrize("form", ["html", "svg", "ansi"])
@pytest.mark.parametrize("body", [TEXT, IDS, CHAT, STREAM])
def test_every_form_is_drawn_in_every_format(form: str, body: dict[str, object]) -> None:
    assert form in MEDIA_TYPES
    whole = picture(**body, format=form, top_k=2)
    assert whole.startswith({"html": "<!DOCTYPE html>", "svg": "<svg", "ansi": ""}[form])
    assert "reward" in whole


def scales(html: str) -> list[str]:
    return re.findall(r"saturates at (±\S+)", html)


def test_responses_share_one_colour_scale_unless_each_is_to_have_its_own() -> None:
    shared, own = picture(**TEXT), picture(**TEXT, compare=False)
    assert len(scales(shared)) == 1
    assert len(set(scales(own))) == 2
    assert len(re.findall("<html", own)) == 1, "one document"
    assert [picture(**TEXT, format="ansi", compare=c).count("colour saturates") for c in (True, False)] == [1, 2]


def test_an_svg_holds_one_picture() -> None:
    assert refusal(**TEXT, format="svg", compare=False) == ("invalid_request", "compare")
    assert refusal(items=[STREAM, STREAM], format="svg", compare=False) == ("invalid_request", "compare")
    assert refusal(**IDS, format="svg", compare=False) == ("invalid_request", "compare")
    assert picture(**STREAM, format="svg", compare=False).startswith("<svg")
    assert picture(**TEXT, format="svg").startswith("<svg")


@pytest.mark.parametrize("form", ["html", "svg", "ansi", "json"])
def test_an_unknown_palette_is_refused(form: str) -> None:
    assert refusal(**TEXT, palette="rainbow", format=form) == ("invalid_request", "palette")


@pytest.mark.parametrize("option", [{"encoding_format": "base64"}, {"on_error": "per_item"}])
def test_options_that_make_no_picture_are_refused(option: dict[str, object]) -> None:
    assert refusal(**TEXT, **option) == ("invalid_request", next(iter(option)))
    assert with_arrays(HeatmapRequest.model_validate(TEXT | option | {"format": "json"}), FROM_DISTRIBUTIONS)


def test_a_picture_needs_its_own_arrays_and_json_gives_what_was_asked_for() -> None:
    asked = TEXT | {"include": ["kl"]}
    assert with_arrays(HeatmapRequest.model_validate(asked), FROM_DISTRIBUTIONS).include == list(ARRAYS)
    assert with_arrays(HeatmapRequest.model_validate(asked | {"format": "json"}), FROM_DISTRIBUTIONS).include == ["kl"]


def test_without_a_choice_json_gives_all_that_a_picture_is_drawn_from() -> None:
    assert with_arrays(HeatmapRequest.model_validate(TEXT | {"format": "json"}), FROM_DISTRIBUTIONS).include == list(
        ARRAYS
    )
