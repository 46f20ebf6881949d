"""Which columns become an item, and which columns an output row has."""

from typing import Any

import pytest
from dense_reward.bulk.columns import FIELDS, Columns, parse_columns, weight
from dense_reward.bulk.records import Faulty, Outcome, Position, SourceRow
from dense_reward.errors import SettingsError
from dense_reward.schemas import Item

ARRAYS = ("token_ids", "reward")
BY_NAME = Columns({}, "last", ARRAYS)


def item(cells: dict[str, Any], columns: Columns = BY_NAME) -> Item:
    found = columns.items(cells)
    assert isinstance(found, list), found
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        ({"prompt": "a", "response": "b", "score": 0.9}, "prompt"),
        ({"prompt": "a", "responses": ["b", "c"]}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"prompt_ids": [1], "response_ids": [2, 3]}, "ids"),
        ({"token_ids": [1, 2], "score_mask": [0, 1], "text": None}, "stream"),
        ({"text": "a b"}, "text"),
    ],
    ids=["prompt", "responses", "messages", "ids", "stream", "text"],
)
def test_each_form_is_found_by_the_names_of_its_columns(cells: dict[str, Any], form: str) -> None:
    assert item(cells).form == form


def test_a_flat_list_of_ids_is_the_only_response() -> None:
    assert item({"prompt_ids": [1], "response_ids": [2, 3]}).response_ids == [[2, 3]]
    assert item({"prompt_ids": [1], "response_ids": [[2], [3]]}).response_ids == [[2], [3]]
    assert item({"prompt_ids": [1], "response_ids": []}).response_ids == [[]]


def test_a_prompt_of_messages_becomes_a_chat_that_ends_with_the_response() -> None:
    chat = item({"prompt": [{"role": "user", "content": "a"}], "response": "b"})
    assert [message.role for message in chat.messages or ()] == ["user", "assistant"]
    assert chat.score == "last"


CHAT = [{"role": "user", "content": "a"}]


def test_a_prompt_of_messages_becomes_a_chat_for_each_response() -> None:
    cells = {"prompt": CHAT, "responses": ["b", "c"], "segments": [[[0, 1]], []], "candidate_ids": [[[1, 2]], [[3, 4]]]}
    found = BY_NAME.items(cells)
    assert isinstance(found, list)
    assert [[message.content for message in chat.messages or ()] for chat in found] == [["a", "b"], ["a", "c"]]
    assert [chat.segments for chat in found] == [[[(0, 1)]], [[]]]
    assert [chat.candidate_ids for chat in found] == [[[[1, 2]]], [[[3, 4]]]]


def test_a_response_can_be_a_list_of_messages() -> None:
    chat = item({"prompt": CHAT, "response": [{"role": "assistant", "content": "b"}]})
    assert [message.content for message in chat.messages or ()] == ["a", "b"]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({}, "needs either response, or responses"),
        ({"response": "a", "responses": ["b"]}, "needs either response, or responses"),
        ({"responses": "b"}, "responses as a list"),
        ({"responses": ["b", "c"], "segments": [[[0, 1]]]}, "segments must have one entry for each of the 2"),
        ({"response": 3}, "messages.1.content"),
    ],
    ids=["none", "both", "text", "segments", "number"],
)
def test_a_prompt_of_messages_without_its_responses_says_why(cells: dict[str, Any], reason: str) -> None:
    found = BY_NAME.items({"prompt": CHAT, **cells})
    assert isinstance(found, Faulty)
    assert reason in found.message


def test_candidates_and_spans_of_one_response_need_no_list_around_them() -> None:
    base = {"prompt_ids": [1], "response_ids": [2]}
    flat = item({**base, "candidate_ids": [[3, 4]], "segments": [[0, 1]]})
    assert (flat.candidate_ids, flat.segments) == ([[[3, 4]]], [[(0, 1)]])
    whole = item({**base, "candidate_ids": [[[3, 4]]], "segments": [[]]})
    assert (whole.candidate_ids, whole.segments) == ([[[3, 4]]], [[]])
    several = {"prompt_ids": [1], "response_ids": [[], [2]], "candidate_ids": [[], [[3]]], "segments": [[], [[0, 1]]]}
    assert item(several).candidate_ids == [[], [[3]]]
    assert item(several).segments == [[], [(0, 1)]]
    rows = output(several, [{"reward": []}, {"reward": [1.0]}])
    assert [(row["response_ids"], row["candidate_ids"], row["segments"]) for row in rows] == [
        ([], [], []),
        ([2], [[3]], [[0, 1]]),
    ]


def test_null_keys_of_a_typed_input_do_not_reach_the_chat_template() -> None:
    tool = {"name": "f", "properties": {"a": {"type": "int"}, "b": None}}
    cells = {
        "messages": [*CHAT, {"role": "assistant", "content": "b"}],
        "tools": [tool],
        "template_kwargs": {"x": None},
    }
    typed = item(cells, Columns({}, "last", ARRAYS, typed=True))
    assert typed.tools == [{"name": "f", "properties": {"a": {"type": "int"}}}]
    assert typed.template_kwargs == {}
    assert item(cells).tools == [tool], "JSONL has only the keys that were written"


def test_a_mapping_reads_its_columns_only() -> None:
    columns = Columns({"prompt": "question", "response": "answer"}, "last", ARRAYS)
    assert item({"question": "a", "answer": "b", "text": "c"}, columns).response == "b"
    missing = columns.items({"question": "a"})
    assert isinstance(missing, Faulty)
    assert "no column 'answer'" in missing.message


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"prompt": "a", "response": "b", "text": "c"}, "this has prompt and text"),
        ({"question": "a"}, "--columns FIELD=COLUMN"),
        ({"prompt": "a", "response": 3}, "response: Input should be a valid string"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "lone surrogate"),
    ],
    ids=["two_forms", "no_form", "number", "surrogate", "surrogate_in_chat"],
)
def test_a_row_that_is_no_item_says_why(cells: dict[str, Any], reason: str) -> None:
    found = BY_NAME.items(cells)
    assert isinstance(found, Faulty)
    assert reason in found.message


@pytest.mark.parametrize("text", ["prompt", "prompt=", "nothing=a", "prompt=a,prompt=b"])
def test_a_wrong_mapping_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--columns"):
        parse_columns(text)


def test_a_wrong_field_is_answered_with_all_fields() -> None:
    with pytest.raises(SettingsError, match=r"candidate_ids, .*segments") as refused:
        parse_columns("nothing=a")
    assert all(name in str(refused.value) for name in FIELDS)


def test_a_mapping_is_parsed() -> None:
    assert parse_columns("prompt=question, response=answer") == {"prompt": "question", "response": "answer"}
    assert parse_columns(None) == {}


def output(cells: dict[str, Any], outcome: Outcome, columns: Columns = BY_NAME) -> list[dict[str, Any]]:
    return list(columns.output_rows(SourceRow(4, cells, Position(5)), outcome))


def test_each_response_has_a_row_with_its_own_response() -> None:
    rows = output({"prompt": "a", "responses": ["b", "c"], "id": 7}, [{"reward": [1.0]}, {"reward": [2.0]}])
    assert [(row["row"], row["response_index"], row["responses"], row["id"]) for row in rows] == [
        (4, 0, "b", 7),
        (4, 1, "c", 7),
    ]


def test_a_single_flat_response_stays_whole() -> None:
    rows = output({"prompt_ids": [1], "response_ids": [2, 3]}, [{"reward": [1.0, 2.0]}])
    assert rows[0]["response_ids"] == [2, 3]


def test_columns_of_the_input_that_are_named_like_ours_are_kept_under_another_name() -> None:
    row = output({"token_ids": [1, 2], "score_mask": [0, 1], "row": "x"}, [{"token_ids": [2], "reward": [1.0]}])[0]
    assert (row["token_ids"], row["input_token_ids"], row["row"], row["input_row"]) == ([2], [1, 2], 4, "x")


def test_no_column_of_the_input_is_lost_to_another_one() -> None:
    cells = {"prompt": "a", "row": 1, "input_row": 2, "input_input_row": 3, "input_id": 4, "reward": 5}
    row = output(cells, [{"sum": 1.0}])[0]
    names = ("row", "input_row", "input_input_row", "input_input_input_row", "input_id", "input_reward")
    assert [row[name] for name in names] == [4, 1, 2, 3, 4, 5]
    assert "reward" not in row, "stats would take it for ours"


def test_a_name_of_the_output_has_one_meaning_whatever_a_row_holds() -> None:
    one, other = (output({"prompt": "a", **cells}, [{"sum": 1.0}])[0] for cells in ({"row": 1}, {"input_row": 2}))
    assert (one["input_row"], one.get("input_input_row")) == (1, None)
    assert (other["input_input_row"], other.get("input_row")) == (2, None)


def test_only_the_column_that_was_scored_is_divided_among_the_responses() -> None:
    mapped = Columns({"prompt": "q", "response_ids": "ids"}, "last", ARRAYS)
    row = {"q": "a", "ids": [[1], [2]], "responses": ["x"], "response_ids": [[9]]}
    rows = output(row, [{"reward": [1.0]}, {"reward": [2.0]}], mapped)
    assert [(row["ids"], row["responses"], row["response_ids"]) for row in rows] == [
        ([1], ["x"], [[9]]),
        ([2], ["x"], [[9]]),
    ]


def test_a_faulty_row_keeps_its_columns_and_has_its_error() -> None:
    assert output({"prompt": "a"}, Faulty("too long")) == [{"prompt": "a", "row": 4, "error": "too long"}]


def test_ids_weigh_as_much_as_their_text() -> None:
    assert weight({"prompt": "abcd", "ids": [1, 2], "nested": [["ab"], [3]], "none": None}) == 4 + 8 + 2 + 4 + 4
