"""Checks that a chat template renders everything that it is given, by a marker in each message and tool. Pure.

Templates drop what they do not support: Gemma 2's drops tool calls, others ignore every role but user and assistant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_reward.errors import refuse
from dense_reward.text.messages import text_of
from dense_reward.text.rendering import EscapedChat, RendersChats
from dense_reward.text.special_tokens import JsonValue, Message

_MARK = "DenseRewardMark"
_LAST_TAG = re.compile(r"(<[^<>\s][^<>\n]{0,60}>|\[/?[A-Z_]{2,40}\])\s*$")


def _mark(*place: object) -> str:
    return f"{_MARK}{'x'.join(map(str, place))}E"


def _marked_messages(messages: Sequence[Message]) -> list[Message]:
    """Canonical messages with a mark at the end of each text and in each tool call."""
    return [_marked_message(message, index) for index, message in enumerate(messages)]


def _marked_message(message: Message, index: int) -> Message:
    marked = dict(message)
    if text_of(message).strip():
        marked["content"] = _marked_content(message["content"], _mark(index))
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence):
        marked["tool_calls"] = [_marked_call(call, _mark(index, at)) for at, call in enumerate(calls)]
    return marked


def _marked_content(content: JsonValue, mark: str) -> JsonValue:
    """The mark follows the last text that is not blank, because blank parts are trimmed away."""
    if isinstance(content, str):
        return content + mark
    parts = list(content) if isinstance(content, Sequence) else []
    last = max(index for index, part in enumerate(parts) if text_of({"content": [part]}).strip())
    part = parts[last]
    assert isinstance(part, Mapping)
    return [*parts[:last], {**part, "text": f"{part['text']}{mark}"}, *parts[last + 1 :]]


def _marked_call(call: JsonValue, mark: str) -> JsonValue:
    """Marks name and arguments: some templates write a call's id instead of its name."""
    assert isinstance(call, Mapping)
    function = call["function"]
    assert isinstance(function, Mapping)
    arguments = function["arguments"]
    assert isinstance(arguments, Mapping)
    return {
        **call,
        "function": {**function, "name": f"{function['name']}{mark}", "arguments": {**arguments, mark: mark}},
    }


def _marked_tools(tools: Sequence[JsonValue]) -> list[JsonValue]:
    """Tools with a mark at the end of each name."""
    return [_marked_tool(tool, _mark("tool", index)) for index, tool in enumerate(tools)]


def _marked_tool(tool: JsonValue, mark: str) -> JsonValue:
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("name"), str):
        return {**tool, "name": f"{tool['name']}{mark}"}
    function = tool.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return {**tool, "function": {**function, "name": f"{function['name']}{mark}"}}
    return tool


@dataclass(frozen=True, slots=True)
class MarkedChat:
    """A chat with its marks, and its rendering with the generation prompt. `last_mark`: that of the last message.

    `tail`: what the rendering has after that mark; None if the last message has no text.
    """

    chat: EscapedChat
    rendered: str
    last_mark: str
    tail: str | None


def refuse_lost(
    tokenizer: RendersChats,
    messages: Sequence[Message],
    tools: Sequence[JsonValue] | None,
    template_kwargs: Mapping[str, JsonValue] | None,
) -> MarkedChat:
    """Raise RequestError(bad_template) if the prompt of canonical messages lacks one of them, or a tool.

    An exception: several templates drop an assistant's text beside its tool calls, so their policies never see it.
    """
    given = None if tools is None else _marked_tools(tools)
    chat = EscapedChat.of(tokenizer, _marked_messages(messages), given, template_kwargs)
    rendered = chat.render(generation_prompt=True)
    for index, message in enumerate(messages):
        _refuse_lost_message(rendered, message, index)
        _refuse_doubled_tag(rendered, message, index)
    for at, tool in enumerate(tools or ()):
        if _marked_tool(tool, "") is not tool and _mark("tool", at) not in rendered:
            what = f"tools.{at}: the chat template does not render this tool, so no policy sees it"
            raise refuse("bad_template", f"{what}: leave it out, or send ids", param="tools")
    mark = _mark(len(messages) - 1)
    return MarkedChat(chat, rendered, mark, rendered.rpartition(mark)[2] if mark in rendered else None)


def _refuse_doubled_tag(rendered: str, message: Message, index: int) -> None:
    """Raise RequestError(repeated_text) for a tool's result that ends in the tag which the template writes after it."""
    tag = _LAST_TAG.search(text_of(message)) if message["role"] == "tool" else None
    after = rendered.partition(_mark(index))[2]
    if tag is not None and after.lstrip().startswith(tag[1]):
        raise refuse(
            "repeated_text",
            f"messages.{index} ends in {tag[1]}, which the chat template writes after each tool's result: leave it and "
            "its beginning out of the content",
            param="messages",
        )


def _refuse_lost_message(rendered: str, message: Message, index: int) -> None:
    calls = message.get("tool_calls")
    count = len(calls) if isinstance(calls, Sequence) else 0
    lost, cure = "", ""
    if any(_mark(index, at) not in rendered for at in range(count)):
        lost, cure = "all of its tool_calls, so no policy sees them", "leave them out"
    elif not count and text_of(message).strip() and _mark(index) not in rendered:
        lost, cure = f"this message of role {message['role']!r}", "leave it out, use a role that the template renders"
    if lost:
        message_ = f"messages.{index}: the chat template does not render {lost}: {cure}, or send ids"
        raise refuse("bad_template", message_, param="messages")
