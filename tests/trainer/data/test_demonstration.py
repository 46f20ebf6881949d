import pytest
from dense_reward_trainer.data.demonstration import parse_line
from dense_reward_trainer.data.demonstration import read_row as read_whole_row
from dense_reward_trainer.data.records import ChatMessage, Demonstration, LineError, RawRow


def read_row(row: RawRow, source: str, strip_annotations: bool = False) -> Demonstration:
    return read_whole_row(row, source, strip_annotations=strip_annotations).demonstration


QUESTION = ChatMessage("user", "What is 2+3?")
ANSWER = ChatMessage("assistant", "5")
QUESTION_ROW = {"role": "user", "content": "What is 2+3?"}
ANSWER_ROW = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION_ROW, ANSWER_ROW]},
        {"prompt": "What is 2+3?", "response": "5"},
        {"prompt": "What is 2+3?", "completion": "5"},
        {"prompt": [QUESTION_ROW], "completion": [ANSWER_ROW]},
        {"prompt": [QUESTION_ROW], "response": [ANSWER_ROW]},
        {"instruction": "What is 2+3?", "output": "5"},
        {"instruction": "What is 2+3?", "input": "", "output": "5"},
        {"instruction": "What is 2+3?", "input": None, "output": "5"},
        {"question": "What is 2+3?", "answer": "5"},
    ],
)
def test_every_format_gives_the_same_demonstration(row: RawRow) -> None:
    assert read_row(row, "here:1") == Demonstration((QUESTION, ANSWER), None, "here:1")


def test_a_chat_keeps_all_turns_and_its_last_message_is_the_response() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        QUESTION_ROW,
        {"role": "assistant", "content": "Let me ask."},
        {"role": "tool", "content": "5"},
        ANSWER_ROW,
    ]
    demonstration = read_row({"messages": chat}, "here:1")
    assert [message.role for message in demonstration.prompt_messages] == ["system", "user", "assistant", "tool"]
    assert demonstration.response == "5"


def test_a_non_empty_input_is_joined_to_the_instruction_with_a_blank_line() -> None:
    demonstration = read_row({"instruction": "Sum these.", "input": "2, 3", "output": "5"}, "here:1")
    assert demonstration.prompt_messages == (ChatMessage("user", "Sum these.\n\n2, 3"),)


def test_texts_are_kept_verbatim() -> None:
    demonstration = read_row({"prompt": "  a\r\n", "response": "\t é🙂 <<1=1>>\n"}, "here:1")
    assert (demonstration.prompt_messages[0].content, demonstration.response) == ("  a\r\n", "\t é🙂 <<1=1>>\n")


def test_extra_columns_and_null_columns_are_no_matter() -> None:
    row = {"prompt": "a", "response": "b", "id": 7, "source": "x", "messages": None, "tools": [], "system": ""}
    assert read_row(row, "here:1").response == "b"


def test_a_prompt_column_beside_messages_is_an_extra_column() -> None:
    row = {"prompt": "What is 2+3?", "prompt_id": "7", "messages": [QUESTION_ROW, ANSWER_ROW]}
    assert read_row(row, "here:1").messages == (QUESTION, ANSWER)


@pytest.mark.parametrize("column", ["context", "history", "documents", "images", "chat_template_kwargs"])
def test_a_column_that_would_change_the_prompt_is_refused(column: str) -> None:
    with pytest.raises(LineError, match=f"unsupported column: '{column}' belongs to the prompt"):
        read_row({"prompt": "a", "response": "b", column: ["x"]}, "here:1")


def test_annotations_are_removed_from_the_response_only_when_asked() -> None:
    row = {"question": "Is <<1+1=2>> right?", "answer": "6*9 = <<6*9=54>>54.\n#### 54"}
    assert read_row(row, "here:1").response == "6*9 = <<6*9=54>>54.\n#### 54"
    stripped = read_row(row, "here:1", strip_annotations=True)
    assert stripped.response == "6*9 = 54.\n#### 54"
    assert stripped.prompt_messages[0].content == "Is <<1+1=2>> right?"


def test_a_response_that_was_nothing_but_annotations_is_empty() -> None:
    with pytest.raises(LineError, match="empty response"):
        read_row({"prompt": "a", "response": " <<1+1=2>> "}, "here:1", strip_annotations=True)


@pytest.mark.parametrize(
    ("stated", "answer"),
    [("1,200", "1200"), (5, "5"), (5.0, "5"), (1e21, "1" + 21 * "0"), ("Paris", "Paris"), (10**400, "1" + 400 * "0")],
)
def test_a_stated_final_answer_wins_over_the_one_in_the_response(stated: object, answer: str) -> None:
    assert read_row({"prompt": "a", "response": "#### 9", "final_answer": stated}, "here:1").answer == answer


def test_without_a_stated_answer_the_response_states_it_or_nothing_does() -> None:
    assert read_row({"prompt": "a", "response": "#### 9.0", "final_answer": None}, "here:1").answer == "9"
    assert read_row({"prompt": "a", "response": "nine"}, "here:1").answer is None


def test_a_line_is_parsed_as_strict_json() -> None:
    assert parse_line(b'{"prompt": "\\u00e9", "n": [1, null]}\r') == {"prompt": "é", "n": [1, None]}
