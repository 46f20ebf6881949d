"""Reads lists of messages: OpenAI's role and content, tool calls included, and ShareGPT's from and value; transcripts.

Pure functions of one value. Must not import files, data sets, tokenizers or chat templates.
"""

import re
from collections.abc import Mapping
from typing import Literal, cast

from dense_reward_trainer.data.records import ROLES, ChatMessage, ChatRole, JsonValue, LineError
from dense_reward_trainer.data.row_values import is_empty, json_type, quoted_keys, strict_json, string

# ShareGPT has no standard; these are the names of its data sets and of the programs that read them.
_SHAREGPT_ROLES: Mapping[str, ChatRole] = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# OpenAI's older form of a tool result. Any other role is refused: a template could ignore it.
_OPENAI_ROLES: Mapping[str, ChatRole] = {**ROLES, "function": "tool"}
_CURES = {
    "human": "write user, or name the keys `from` and `value`",
    "gpt": "write assistant, or name the keys `from` and `value`",
    "developer": "write system",
    "prompter": "write user",
}
_FIELDS = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "weight")
_KEEP_TEXT = (
    '{**r, "messages": [{k: m[k] for k in ("role", "content", "tool_calls", "tool_call_id", "reasoning_content") '
    'if m.get(k)} for m in r["messages"]]}'
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES: dict[str, ChatRole] = {"Human": "user", "Assistant": "assistant"}


def messages_of(value: object, name: str) -> tuple[ChatMessage, ...]:
    """The messages of a list. Raises LineError; `name` is the column of the list."""
    if not isinstance(value, list | tuple):
        raise LineError("wrong type", f"`{name}` is {json_type(value)}, a list of messages is needed")
    if not value:
        raise LineError("empty prompt" if name == "prompt" else "no response", f"`{name}` is an empty list")
    return tuple(_message(item, f"`{name}`[{index}]", name) for index, item in enumerate(value))


def alternating(texts: list[str] | tuple[str, ...], name: str) -> tuple[ChatMessage, ...]:
    """LIMA's form: a list of texts, the user's first, then by turns."""
    roles: tuple[ChatRole, ChatRole] = ("user", "assistant")
    return tuple(ChatMessage(roles[i % 2], string(text, f"`{name}`[{i}]")) for i, text in enumerate(texts))


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript in which paragraphs that start with Human: and Assistant: are turns (HH-RLHF)."""
    return text.startswith(("\n\nHuman:", "\n\nAssistant:")) or (text.startswith("Human:") and "\n\nAssistant:" in text)


def transcript_turns(text: str) -> tuple[ChatMessage, ...]:
    """The turns of a transcript, in order. One space after a mark belongs to the mark; all else is content."""
    text = f"\n\n{text}" if text.startswith("Human:") else text
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        ChatMessage(_TRANSCRIPT_ROLES[mark[1]], text[mark.end() : end].removeprefix(" "))
        for mark, end in zip(marks, ends, strict=True)
    )


def tools_of(value: object, name: str) -> tuple[Mapping[str, JsonValue], ...]:
    """Definitions of tools in OpenAI's form; bare functions are wrapped, and a JSON text is parsed first."""
    listed = strict_json(value, f"`{name}`") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise LineError("wrong type", f"`{name}` is {json_type(listed)}, a list of tool definitions is needed")
    return tuple(_tool(item, f"`{name}`[{index}]") for index, item in enumerate(listed))


def _tool(value: object, name: str) -> Mapping[str, JsonValue]:
    tool = _filled(strict_json(value, name) if isinstance(value, str) else value)
    if isinstance(tool, dict) and isinstance(tool.get("name"), str) and "function" not in tool:
        tool = {"type": "function", "function": {key: part for key, part in tool.items() if key != "type"}}
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise LineError(
            "wrong type", f'{name} is not a tool definition: write {{"type": "function", "function": {{"name": ...}}}}'
        )
    return {"type": "function", **tool}


def _filled(value: object) -> object:
    """An object without its null entries, whatever is in the others; any other value as it is."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _message(value: object, name: str, column: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise LineError("wrong type", f"{name} is {json_type(value)}, an object with role and content is needed")
    if "from" in value and value.get("role") is None:
        return _sharegpt_message(value, name)
    extra = [key for key, part in value.items() if key not in _FIELDS and not is_empty(part)]
    if extra:
        detail = f"{name} has {quoted_keys(extra)}, only {', '.join(_FIELDS)} are understood"
        if not {"reasoning", "thinking"}.isdisjoint(extra):
            raise LineError("unknown keys", f"{detail}: write the thoughts as reasoning_content")
        keeps = column == "messages" and isinstance(value.get("role"), str)
        raise LineError("unknown keys", detail, _rows(_KEEP_TEXT) if keeps else "")
    given = string(value.get("role"), f"{name}.role")
    if given not in _OPENAI_ROLES:
        cure = f": {_CURES[given]}" if given in _CURES else ""
        raise LineError("unknown role", f"{name}.role is {given!a}, one of {', '.join(ROLES)} is needed{cure}")
    return _openai_message(value, _OPENAI_ROLES[given], name)


def _openai_message(value: Mapping[str, object], role: ChatRole, name: str) -> ChatMessage:
    calls = _tool_calls(value, name)
    for key in ("tool_calls", "function_call", "reasoning_content", "weight"):
        if role != "assistant" and not is_empty(value.get(key)):
            raise LineError("wrong type", f"{name} has {key!r}, which only an assistant's message can have")
    if role != "tool" and not is_empty(value.get("name")):
        detail = f"{name} has 'name', which no chat template writes: put it into the content, or remove it"
        raise LineError("unknown keys", detail, _rows(_KEEP_TEXT))
    content = value.get("content")
    return ChatMessage(
        role,
        "" if content is None and calls else _text(content, f"{name}.content"),
        calls,
        _optional(value, "tool_call_id", name),
        _optional(value, "name", name),
        _optional(value, "reasoning_content", name),
        _weight(value.get("weight"), name),
    )


def _sharegpt_message(value: Mapping[str, object], name: str) -> ChatMessage:
    extra = [key for key, part in value.items() if key not in ("from", "value", "weight") and not is_empty(part)]
    if extra:
        raise LineError("unknown keys", f"{name} has {quoted_keys(extra)}, only from, value and weight are understood")
    given = string(value.get("from"), f"{name}.from")
    if given not in _SHAREGPT_ROLES:
        raise LineError("unknown role", f"{name}.from is {given!a}, one of {', '.join(_SHAREGPT_ROLES)} is needed")
    role, text = _SHAREGPT_ROLES[given], string(value.get("value"), f"{name}.value")
    weight = _weight(value.get("weight"), name)
    if given != "function_call":
        return ChatMessage(role, text, weight=weight)
    called = strict_json(text, f"{name}.value")
    calls = tuple(_call(call, f"{name}.value") for call in (called if isinstance(called, list) else [called]))
    return ChatMessage(role, "", calls, weight=weight)


def _text(content: object, name: str) -> str:
    """A text, or the text of a list that holds one text part."""
    if isinstance(content, list | tuple) and content:
        parts = [_filled(part) for part in content]
        if len(parts) == 1 and isinstance(parts[0], dict) and parts[0].get("type") == "text":
            return string(parts[0].get("text"), f"{name}[0].text")
        detail = f"{name} is a list of {len(parts)} parts, a string is needed: join text parts; images are not read"
        raise LineError("wrong type", detail)
    return string(content, name)


def _optional(value: Mapping[str, object], key: str, name: str) -> str | None:
    return None if is_empty(value.get(key)) else string(value[key], f"{name}.{key}")


def _weight(value: object, name: str) -> Literal[0, 1]:
    if value is not None and (isinstance(value, bool) or value not in (0, 1)):
        raise LineError("wrong type", f"{name}.weight is {value!a}, 0 or 1 is needed")
    return 0 if value == 0 and value is not None else 1


def _tool_calls(value: Mapping[str, object], name: str) -> tuple[Mapping[str, JsonValue], ...]:
    calls, older = value.get("tool_calls"), value.get("function_call")
    if not is_empty(older):
        return (_call(older, f"{name}.function_call"),)
    if is_empty(calls):
        return ()
    if not isinstance(calls, list | tuple):
        raise LineError("wrong type", f"{name}.tool_calls is {json_type(calls)}, a list is needed")
    return tuple(_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls))


def _call(value: object, name: str) -> Mapping[str, JsonValue]:
    """One call in OpenAI's form. A bare {name, arguments} is wrapped; arguments as a JSON text are parsed."""
    call = _filled(value)
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = _filled(call.get("function")) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise LineError(
            "wrong type", f'{name} is not a tool call: write {{"function": {{"name": ..., "arguments": ...}}}}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = strict_json(arguments, f"{name}.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise LineError("wrong type", f"{name}: arguments are {json_type(arguments)}, an object is needed")
    whole = {"type": "function", **call, "function": {**function, "arguments": arguments}}
    return cast(Mapping[str, JsonValue], whole)


def _rows(expression: str) -> str:
    """A conversion of all rows from an expression for one row, r."""
    return f"[{expression} for r in rows]"
