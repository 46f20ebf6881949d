"""Layouts, messages and columns: nothing of a prompt is lost, and what is ambiguous is refused."""

import json
import re
import shlex
from pathlib import Path

import pytest
from dense_reward_trainer.data.conversions import is_prompt_column
from dense_reward_trainer.data.demonstration import read_row
from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.layouts import LAYOUTS
from dense_reward_trainer.data.records import ChatMessage, LineError, RawRow
from dense_reward_trainer.data.row_values import is_empty, texts_in
from dense_reward_trainer.data.sources import DataError, DataSource, data_sha256, load
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = (
    *("prompt", "instruction", "question", "query", "problem", "input", "system", "system_prompt"),
    *("context", "passage", "documents", "hint", "choices", "history", "user_context"),
)
RESPONSES = ("response", "output", "answer", "completion", "solution", "chosen")
OTHERS = ("id", "source", "category", "context_id")
TEXTS = st.text("ab \n", max_size=3)
VALUES = TEXTS | st.none() | st.lists(TEXTS, max_size=2)
COLUMNS = st.dictionaries(st.sampled_from((*PROMPTS, *RESPONSES, *OTHERS)), VALUES, max_size=3)
PAIRS = [("prompt", "response"), ("instruction", "output"), ("question", "answer"), ("query", "response")]
CALL = {"id": "c1", "type": "function", "function": {"name": "depth", "arguments": '{"lake": "Como", "deep": null}'}}
PARSED = {
    "id": "c1",
    "type": "function",
    "function": {"name": "depth", "arguments": {"lake": "Como", "deep": None}},
}
TOOL = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}


@given(COLUMNS, st.sampled_from(PAIRS), TEXTS)
def test_whatever_is_read_keeps_every_visible_character_of_the_prompt(
    row: dict[str, object], pair: tuple[str, str], prompt: str
) -> None:
    row |= {pair[0]: f"a{prompt}", pair[1]: "the response"}
    try:
        reading = read_row(row, "here:1")
    except LineError:
        return
    content = "\n".join(message.content for message in reading.demonstration.prompt_messages)
    for column in PROMPTS:
        assert all(text.strip() in content for text in texts_in(row.get(column)))
    assert reading.demonstration.response == "the response"
    named = {column for column in OTHERS if not is_empty(row.get(column))}
    assert named <= set(reading.not_read), "every other column with content is named"


@pytest.mark.parametrize(
    "name",
    ["context", "Context", "userContext", "retrieved_documents", "few-shot examples", "image_path", "hints", "kwargs"],
)
def test_a_column_of_the_prompt_is_known_by_the_words_of_its_name(name: str) -> None:
    assert is_prompt_column(name)


@pytest.mark.parametrize(
    "name", ["id", "source", "context_id", "question_type", "original_question", "rejected", "documents_count", "7"]
)
def test_a_fact_about_a_row_is_no_column_of_the_prompt(name: str) -> None:
    assert not is_prompt_column(name)


def test_a_column_can_be_ignored_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "a?", "context": "c", "answer": "b"}))
    with pytest.raises(DataError, match="name it in ignore_columns"):
        load(DataSource(source=str(path)))
    loaded = load(DataSource(source=str(path), ignore_columns=("context",)))
    assert loaded.demonstrations[0].prompt_messages == (ChatMessage("user", "a?"),)


def chat(*messages: RawRow, **columns: object) -> RawRow:
    return {"messages": [*messages], **columns}


def test_tool_calls_are_carried_with_parsed_arguments_and_null_content_is_empty() -> None:
    row = chat(
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "410"},
        {"role": "assistant", "content": "410 metres.", "reasoning_content": "Look it up."},
        tools=json.dumps([TOOL]),
    )
    demonstration = read_row(row, "here:1").demonstration
    assert [message.as_mapping() for message in demonstration.messages] == [
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "content": "", "tool_calls": (PARSED,)},
        {"role": "tool", "content": "410", "tool_call_id": "c1"},
        {"role": "assistant", "content": "410 metres.", "reasoning_content": "Look it up."},
    ]
    assert demonstration.tools == (TOOL,)


def test_a_response_can_be_a_call_alone_and_arguments_can_be_an_object() -> None:
    function = {"name": "depth", "arguments": {"lake": "Como"}}
    row = chat({"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": function}]})
    (call,) = read_row(row, "here:1").demonstration.messages[-1].tool_calls
    assert call == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "which only an assistant's message can have"),
        ({"role": "assistant", "content": None}, "content is missing, a string is needed"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "arguments are a list",
        ),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls is a string, a list is needed"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight is 0.5, 0 or 1 is needed"),
        ({"role": "developer", "content": "a"}, "one of system, user, assistant, tool is needed: write system"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "has 'refusal', only role, content"),
        ({"from": "narrator", "value": "a"}, "from is 'narrator'"),
        ({"from": "gpt", "value": "a", "markdown": "b"}, "has 'markdown', only from, value and weight"),
    ],
)
def test_a_message_that_is_not_understood_is_refused(message: RawRow, fault: str) -> None:
    with pytest.raises(LineError, match=fault):
        read_row(chat({"role": "user", "content": "a"}, message), "here:1")


def test_rows_without_a_response_are_prompts_only_where_prompts_are_enough(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "a?"}]
    rows: list[RawRow] = [
        {"data_source": "x", "prompt": ask, "reward_model": {"style": "rule", "ground_truth": "1"}},
        {"prompt": "a?"},
        {"messages": ask},
        {"prompt": "a?", "response": "b"},
        {"prompt": "\n\nHuman: a?\n\nAssistant:"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(DataSource(source=str(path)), prompts_only=True)
    assert [one.prompt_messages for one in loaded.demonstrations] == 5 * [(ChatMessage("user", "a?"),)]
    assert [one.response for one in loaded.demonstrations] == ["", "", "", "b", ""]
    with pytest.raises(DataError, match="4 of 5 lines") as refusal:
        load(DataSource(source=str(path)))
    assert "verl: it has prompts and right answers, but no response to learn" in str(refusal.value)


def test_held_out_demonstrations_keep_tools_and_calls(tmp_path: Path) -> None:
    row = chat(
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "410"},
        {"role": "assistant", "content": "410 metres."},
        tools=[TOOL],
    )
    demonstration = read_row(row, "here:1").demonstration
    write_held_out(tmp_path / "held_out.jsonl", [demonstration])
    kept = load(DataSource(source=str(tmp_path / "held_out.jsonl"))).demonstrations
    assert kept[0].messages == demonstration.messages
    assert data_sha256(kept) == data_sha256([demonstration])
    others = [read_row(chat(*row["messages"]), "here:1").demonstration]  # type: ignore[misc]
    assert data_sha256(others) != data_sha256(kept), "tools belong to the prompt"


def test_the_examples_of_the_documentation_are_read_and_every_layout_has_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    examples = [json.loads(found) for found in re.findall(r"\| `(\{.*?\})` \|", page) if "..." not in found]
    readings = [read_row(example, "here:1", prompts_only=True) for example in examples]
    assert all(reading.demonstration.prompt_messages[-1].content in ("2+3?", "Add.\n\n2, 3") for reading in readings)
    named = set(re.findall(r"`(\w+)`", page))
    assert {key for layout in LAYOUTS for key in layout.keys} <= named
    assert len(examples) >= 9


class Dataset(list[RawRow]):
    """A data set as `datasets` gives it: every object has the keys of all others, with nulls."""


def test_nulls_with_which_arrow_fills_objects_are_no_arguments_and_no_parameters() -> None:
    arguments, others = {"lake": "Como", "river": None}, {"tool_call_id": None, "name": None, "tool_calls": None}
    parameters = {"type": "object", "properties": {"lake": {"type": "string"}, "river": None}}
    messages = [
        {"role": "user", "content": "a", **others},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    rows = Dataset([{"messages": messages, "tools": tools, "id": None}])
    loaded = load(DataSource(source="own/data"), lambda *_: rows)
    (one,) = loaded.demonstrations
    assert one.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"lake": "Como"}}
    assert json.loads(json.dumps(one.tools))[0]["function"]["parameters"]["properties"] == {"lake": {"type": "string"}}
    assert loaded.not_read == {}


def test_a_data_set_is_converted_by_a_command_that_names_it() -> None:
    rows = Dataset([{"input": "a", "output": "b"}])
    with pytest.raises(DataError) as refusal:
        load(DataSource(source="own/data:small@test"), lambda *_: rows)
    command = next(line for line in str(refusal.value).split("\n") if line.startswith("To convert them: "))
    program = shlex.split(command.removeprefix("To convert them: "))[2]
    assert "load_dataset('own/data', 'small', split='test')" in program
    compile(program, "converts", "exec")
