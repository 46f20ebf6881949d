"""Messages in OpenAI's form reach templates as vLLM passes them, or are refused in words."""

import pytest
from dense_reward.errors import RequestError
from dense_reward.text.messages import (
    MAX_ARGUMENTS_DEPTH,
    MAX_ARGUMENTS_VALUES,
    MAX_PARTS,
    canonical,
    for_template,
    text_of,
)
from dense_reward.text.special_tokens import JsonValue, Message


def call(arguments: JsonValue = "{}", **others: JsonValue) -> JsonValue:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **others}


def calling(*calls: JsonValue, **others: JsonValue) -> Message:
    return {"role": "assistant", "tool_calls": list(calls), **others}


def part(text: str, **others: JsonValue) -> JsonValue:
    return {"type": "text", "text": text, **others}


def arguments_of(message: Message) -> JsonValue:
    calls = canonical([message])[0]["tool_calls"]
    assert isinstance(calls, list)
    arguments: JsonValue = calls[0]["function"]["arguments"]
    return arguments


@pytest.mark.parametrize(
    ("sent", "parsed"),
    [
        ('{"b": 1, "a": [2.0, null]}', {"b": 1, "a": [2.0, None]}),
        ({"b": 1}, {"b": 1}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ('{"é": "\\u00e9"}', {"é": "é"}),
    ],
)
def test_arguments_are_an_object_however_they_are_sent(sent: JsonValue, parsed: JsonValue) -> None:
    assert arguments_of(calling(call(sent))) == parsed


def test_the_order_of_keys_stays() -> None:
    assert list(arguments_of(calling(call('{"z": 1, "a": 2}')))) == ["z", "a"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (calling(call('{"a": 1')), "messages.0.tool_calls.0.function.arguments is not valid JSON"),
        (calling(call("[1]")), "must be a JSON object"),
        (calling(call("3")), "must be a JSON object"),
        (calling(call([1])), "must be a JSON object"),
        (calling(call('{"a": NaN}')), "NaN is not JSON"),
        (calling(call('{"a": ' + "9" * 500 + "}")), "an integer of 500 digits, more than 400"),
        (calling(call('{"a": 1e999}')), "is not valid JSON"),
        (calling(call('{"a": "\\ud800"}')), "is not valid JSON"),
        (calling(call("[" * 60_000)), "nested too deeply"),
        (calling(call("[" * 70_000)), f"more than {MAX_ARGUMENTS_VALUES} values"),
        ({"role": "user", "content": ["a"] * (MAX_PARTS + 1)}, f"1025 parts of content; the limit is {MAX_PARTS}"),
        (calling(call('{"a":' * 99 + "1" + "}" * 99)), f"more than {MAX_ARGUMENTS_DEPTH} levels"),
        (calling(call(), 1), "tool_calls.1 must be an object"),
        (calling(call(type="custom")), "only 'function' is supported"),
        (calling({"id": "1", "type": "function"}), "must have a function with a name"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls must be a list"),
        ({"role": "user", "content": "a", "tool_calls": [call()]}, "only the assistant calls tools"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "only a tool's result has one"),
        ({"role": "user", "content": None}, "messages.0 has no content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.0 has no content"),
        ({"role": "tool", "tool_call_id": "1"}, "messages.0 has no content"),
        ({"role": "user", "content": 1}, "must be a string or a list of text parts"),
        ({"role": "user", "content": {"type": "text"}}, "must be a string or a list of text parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, "has type 'image_url'"),
        ({"role": "user", "content": [{"text": "a"}]}, "has type None"),
        ({"role": "user", "content": [{"type": "text"}]}, "needs a string named text"),
        ({"role": "user", "content": [part("a", cache_control={"type": "x"})]}, "has cache_control"),
        ({"role": "user", "content": [1]}, "content.0 must be"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "put its text into content"),
        ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, "put its transcript into content"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "send it in tool_calls"),
        ({"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}, "send one of them"),
        ({"content": "a"}, "has no role"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_no_template_can_render_is_refused_with_its_place(message: Message, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        canonical([message])
    assert reason in str(refused.value)
    assert (refused.value.code, refused.value.faults[0].param) == ("invalid_request", "messages")


def test_keys_that_openai_clients_send_empty_are_dropped() -> None:
    sent: Message = {
        "role": "assistant",
        "content": "a",
        **dict.fromkeys(("refusal", "audio", "function_call", "name")),
        **{"annotations": [], "tool_calls": []},
    }
    assert canonical([sent]) == [{"role": "assistant", "content": "a"}]


def test_a_call_without_its_wrapper_gets_one() -> None:
    flat = {"id": "1", "name": "f", "arguments": '{"a": 1}'}
    assert canonical([calling(flat)])[0]["tool_calls"] == [
        {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    ]


def test_canonical_messages_stay_as_they_are_and_the_callers_are_not_written_to() -> None:
    sent = [calling(call('{"a": 1}')), {"role": "user", "content": [part("a"), "b"], "name": "Ann"}]
    once = canonical(sent)
    assert canonical(once) == once
    assert sent[0] == calling(call('{"a": 1}'))
    assert once[1] == {"role": "user", "content": [part("a"), part("b")], "name": "Ann"}


CHAT: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "user", "content": [part("a"), part("b")]},
    {"role": "assistant", "content": None},
    {"role": "tool", "content": [part("1"), part("2")]},
]


def test_templates_of_strings_get_parts_joined_by_line_breaks() -> None:
    taken = for_template(CHAT, parts=False, developer=True)
    assert [message["content"] for message in taken] == ["a", "a\nb", "", "1\n2"]


def test_templates_of_parts_get_parts_except_for_results_of_tools() -> None:
    taken = for_template(CHAT, parts=True, developer=True)
    assert [message["content"] for message in taken] == [[part("a")], [part("a"), part("b")], [], "1\n2"]


def test_a_thought_has_both_names() -> None:
    (taken,) = for_template(
        [{"role": "assistant", "content": "a", "reasoning_content": "b"}], parts=False, developer=True
    )
    assert (taken["reasoning"], taken["reasoning_content"]) == ("b", "b")


@pytest.mark.parametrize(
    ("roles", "taken"),
    [
        (["developer", "user"], [("system", "0"), ("user", "1")]),
        (["system", "developer", "user"], [("system", "0\n\n1"), ("user", "2")]),
        (["user", "developer"], [("system", "1"), ("user", "0")]),
        (["user", "system"], [("user", "0"), ("system", "1")]),  # no developer: nothing is moved
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_a_developer_is_the_system_where_the_template_does_not_know_the_role(
    roles: list[str], taken: list[tuple[str, str]], parts: bool
) -> None:
    messages = for_template(
        [{"role": role, "content": str(index)} for index, role in enumerate(roles)], parts=parts, developer=False
    )
    assert [(message["role"], text_of(message)) for message in messages] == taken


def test_a_developer_stays_where_the_template_knows_the_role() -> None:
    messages: list[Message] = [{"role": "developer", "content": "a"}]
    assert for_template(messages, parts=False, developer=True) == messages
