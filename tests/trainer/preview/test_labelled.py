"""Labelled data: its two forms, which their keys distinguish, and what is refused with the cure."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from dense_reward_trainer.data.final_answers import AnswerChecker
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.preview.labelled import read_labelled

CHAT = [{"role": "user", "content": "1+1?"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "2"}]


def written(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": "1+1?", "response": "2", "right": True}, [("2", True)]),
        ({"question": "1+1?", "answer": "3", "right": False}, [("3", False)]),
        ({"prompt": "1+1?", "responses": ["2", "3"], "right": [True, False]}, [("2", True), ("3", False)]),
        ({"messages": ANSWERED, "right": True}, [("2", True)]),
        ({"messages": CHAT, "response": "3", "right": False}, [("3", False)]),
        ({"messages": CHAT, "responses": ["2", "4"], "right": [True, False]}, [("2", True), ("4", False)]),
    ],
    ids=["response", "answer", "responses", "messages", "messages+response", "messages+responses"],
)
def test_judged_answers_are_read_in_every_layout(
    tmp_path: Path, row: dict[str, object], answers: list[tuple[str, bool]]
) -> None:
    found = read_labelled(written(tmp_path, [row]), "final_answer")
    assert found.right is not None
    assert [(d.response, right) for d, right in zip(found.demonstrations, found.right, strict=True)] == answers
    assert {one.prompt_messages[0].content for one in found.demonstrations} == {"1+1?"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "p", "response": "2", "right": 1}, "`right` is a number, true or false is needed"),
        ({"prompt": "p", "response": "2", "right": "true"}, "`right` is a string"),
        ({"prompt": "p", "response": "2", "right": [True]}, "`right` is a list"),
        ({"prompt": "p", "response": "2"}, "`right` is missing, but other rows have it"),
        ({"prompt": "p", "response": "2", "right": None}, "`right` is missing"),
        ({"prompt": "p", "responses": ["2", "3"], "right": [True]}, "one for each of the 2 responses"),
        ({"prompt": "p", "responses": ["2"], "right": True}, "one for each of the 1 responses"),
        ({"prompt": "p", "responses": "2", "right": True}, "must be a list of one or more texts"),
        ({"prompt": "p", "responses": [], "right": []}, "a list of one or more texts"),
        ({"prompt": "p", "responses": ["2", 3], "right": [True, True]}, "a list of one or more texts"),
        ({"prompt": "p", "response": "2", "responses": ["3"], "right": [True]}, "keep one of them"),
        ({"messages": ANSWERED, "response": "3", "right": True}, "ends with an answer"),
        ({"messages": CHAT, "right": True}, "not by the assistant"),
        ({"prompt": "p", "right": True}, "unknown keys"),
        ({"prompt": "p", "response": " ", "right": True}, "empty response"),
        ([], "the line is a list"),
    ],
)
def test_rows_that_are_no_judged_answers_are_refused_with_their_place(
    tmp_path: Path, row: object, complaint: str
) -> None:
    path = written(tmp_path, [{"prompt": "1+1?", "response": "2", "right": True}, row])
    with pytest.raises(DataError, match=f"1 of 2 rows are no judged answers:\n  {re.escape(str(path))}:2: ") as caught:
        read_labelled(path, "final_answer")
    assert complaint in str(caught.value)


def test_rows_without_right_are_prompts_and_those_without_a_known_answer_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "final_answer": 2}, {"prompt": "2+2?", "response": "#### 4"}, {"prompt": "3+3?"}]
    found = read_labelled(written(tmp_path, rows), "final_answer")
    assert found.right is None
    assert [one.answer for one in found.demonstrations] == ["2", "4"]
    assert "answers are known for 2 rows" in found.summary


def test_exact_needs_the_response_that_is_right(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "final_answer": 2}, {"prompt": "2+2?", "response": "4"}]
    found = read_labelled(written(tmp_path, rows), "exact")
    assert [one.response for one in found.demonstrations] == ["4"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "1+1?"}, "no row states its answer"),
        ({"prompt": "1+1?", "final_answer": "two"}, "set checker to final_answer or exact"),
        ({"nothing": 1}, "unknown keys"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(tmp_path: Path, row: dict[str, object], complaint: str) -> None:
    checker: AnswerChecker = "last_number" if row.get("final_answer") == "two" else "final_answer"
    with pytest.raises(DataError, match=complaint):
        read_labelled(written(tmp_path, [row]), checker)


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_labelled(tmp_path / name, "final_answer")
