"""The messages of a chat in the form that chat templates take. Pure; knows no tokenizer.

OpenAI's API and chat templates differ: content can be null or a list of parts, the arguments of a tool call are a JSON
string, and clients send keys that are null. vLLM converts messages before it renders them; the rules here give the
same text, but refuse what vLLM drops or repairs in silence.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from dense_reward.errors import refuse
from dense_reward.text.special_tokens import JsonValue, Message

MAX_PARTS = 1_024
MAX_ARGUMENTS_VALUES = 65_536
"""Limit on the values in the arguments of one call: those in a string were not counted with the body."""
MAX_DIGITS = 400
"""Limit on an integer in the arguments; a float has no more before its point."""
MAX_ARGUMENTS_DEPTH = 64
"""Templates and the escaping of special tokens walk arguments recursively."""
# Keys of OpenAI's answers that chat templates do not render, each with the cure.
_WITHOUT_PLACE: Mapping[str, str] = {
    "refusal": "put its text into content",
    "audio": "put its transcript into content",
    "function_call": "send it in tool_calls, as {'type': 'function', 'function': {'name': ..., 'arguments': ...}}",
    "annotations": "leave it out",
}


def canonical(messages: Sequence[Message]) -> list[Message]:
    """Messages with parsed arguments and without empty keys; content is a string, a list of text parts or None.

    Canonical messages stay as they are. Raises RequestError(invalid_request) for what no template can render.
    """
    return [_canonical(message, f"messages.{index}") for index, message in enumerate(messages)]


def _canonical(message: Message, place: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        _refuse(f"{place} has no role")
    for key, cure in _WITHOUT_PLACE.items():
        if message.get(key) not in (None, [], {}):
            _refuse(f"{place} has {key}, which chat templates do not render: {cure}")
    kept: dict[str, JsonValue] = {
        key: value for key, value in message.items() if value is not None and key not in _WITHOUT_PLACE
    }
    if "reasoning" in kept:
        thought = kept.pop("reasoning")
        if kept.setdefault("reasoning_content", thought) != thought:
            _refuse(f"{place} has reasoning and a different reasoning_content: send one of them")
    calls = kept.pop("tool_calls", None)
    if calls is not None and calls != []:
        if role != "assistant":
            _refuse(f"{place} has tool_calls, but its role is {role}: only the assistant calls tools")
        kept["tool_calls"] = _calls(calls, place)
    if "tool_call_id" in kept and role != "tool":
        _refuse(f"{place} has tool_call_id, but its role is {role}: only a tool's result has one")
    kept["content"] = _content(message.get("content"), place, optional="tool_calls" in kept)
    return kept


def _content(content: JsonValue, place: str, *, optional: bool) -> JsonValue:
    if content is None:
        if not optional:
            _refuse(f"{place} has no content: only an assistant's message with tool_calls can omit it")
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(f"{place}: content must be a string or a list of text parts")
    if len(content) > MAX_PARTS:
        _refuse(f"{place} has {len(content)} parts of content; the limit is {MAX_PARTS}: join them")
    return [_part(part, f"{place}.content.{index}") for index, part in enumerate(content)]


def _part(part: JsonValue, place: str) -> JsonValue:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        _refuse(f"{place} must be {{'type': 'text', 'text': ...}}")
    if part.get("type") != "text":
        _refuse(f"{place} has type {part.get('type')!r}: only parts of type 'text' are scored here")
    text = part.get("text")
    if not isinstance(text, str):
        _refuse(f"{place}: a part of type 'text' needs a string named text")
    others = sorted(key for key, value in part.items() if key not in {"type", "text"} and value is not None)
    if others:
        _refuse(f"{place} has {others[0]}, which is not rendered: leave it out")
    return {"type": "text", "text": text}


def _calls(calls: JsonValue, place: str) -> JsonValue:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        _refuse(f"{place}: tool_calls must be a list")
    return [_call(call, f"{place}.tool_calls.{index}") for index, call in enumerate(calls)]


def _call(call: JsonValue, place: str) -> JsonValue:
    if not isinstance(call, Mapping):
        _refuse(f"{place} must be an object")
    if call.get("type", "function") != "function":
        _refuse(f"{place} has type {call['type']!r}: only 'function' is supported")
    if "function" not in call and "name" in call:  # a form of data sets: the function without its wrapper
        outer = {key: value for key, value in call.items() if key in {"id", "type"}}
        call = {**outer, "function": {key: value for key, value in call.items() if key not in {"id", "type"}}}
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(f"{place} must have a function with a name")
    arguments = _arguments(function.get("arguments"), f"{place}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: JsonValue, place: str) -> JsonValue:
    """The arguments of a call as an object. OpenAI's API writes them as a JSON string; empty ones are {}."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        if sum(map(arguments.count, ",[{")) > MAX_ARGUMENTS_VALUES:
            _refuse(f"{place} has more than {MAX_ARGUMENTS_VALUES} values: shorten it")
        try:
            arguments = json.loads(arguments, parse_constant=_not_json, parse_int=_integer)
            json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # 1e999 and lone surrogates
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            _refuse(f"{place} is not valid JSON ({reason}): send a JSON object, as a string or as it is")
    if not isinstance(arguments, Mapping):
        # Not the whole of a list: writing numbers of thousands of digits holds the interpreter.
        given = f"a list of {len(arguments)}" if isinstance(arguments, list) else json.dumps(arguments)[:40]
        _refuse(f"{place} must be a JSON object, as a string or as it is; it is {given}")
    if _is_deeper(arguments, MAX_ARGUMENTS_DEPTH):
        _refuse(f"{place} is nested more than {MAX_ARGUMENTS_DEPTH} levels deep: flatten it")
    return arguments


def _integer(digits: str) -> int:
    """Long ones take the square of their length to read and to write, with the interpreter held."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _is_deeper(value: JsonValue, depth: int) -> bool:
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return False
    entries = value.values() if isinstance(value, Mapping) else value
    return depth == 0 or any(_is_deeper(entry, depth - 1) for entry in entries)


def for_template(messages: Sequence[Message], *, parts: bool, developer: bool) -> list[Message]:
    """Messages in the form that a template takes. `parts`: it reads content as a list of parts, else as a string.

    `developer`: it knows this role. Otherwise such messages become system messages, and all system messages are joined
    into one at the start.
    """
    taken = [_for_template(message, parts=parts) for message in messages]
    if developer or not any(message["role"] == "developer" for message in taken):
        return taken
    return _one_system_message([{**m, "role": "system"} if m["role"] == "developer" else m for m in taken])


def _for_template(message: Message, *, parts: bool) -> Message:
    # The result of a tool is a string for every template: those that loop over parts do so for other roles only.
    as_parts = parts and message.get("role") != "tool"
    content = message.get("content")
    if as_parts and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif as_parts:
        content = content or []
    elif content is None or not isinstance(content, str):
        content = text_of(message)
    taken: dict[str, JsonValue] = {**message, "content": content}
    if message.get("role") == "assistant" and message.get("reasoning_content") is not None:
        taken["reasoning"] = message["reasoning_content"]  # templates read either name
    return taken


def without_printed_parts(messages: Sequence[Message], rendered: str) -> list[Message] | None:
    """The messages with a string where the template has printed a list of parts as Python does; None if it has not.

    Some templates loop over the parts of a user's message, but take a system message only as a string (Gemma 4).
    """
    printed = [
        not isinstance(message["content"], str) and bool(message["content"]) and str(message["content"]) in rendered
        for message in messages
    ]
    if not any(printed):
        return None
    return [{**m, "content": text_of(m)} if is_ else m for m, is_ in zip(messages, printed, strict=True)]


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    """All system messages as one at the start, if one of them stands elsewhere or there are several."""
    systems = [index for index, message in enumerate(messages) if message["role"] == "system"]
    if systems in ([], [0]):
        return list(messages)
    texts = [text for text in (text_of(messages[index]) for index in systems) if text]
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def text_of(message: Message) -> str:
    """The content of a canonical message as one string: parts are joined by line breaks; "" if there is no content."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_texts(content))


def _texts(parts: JsonValue) -> Iterable[str]:
    if isinstance(parts, Sequence):
        for part in parts:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield str(part["text"])


def _refuse(message: str) -> NoReturn:
    raise refuse("invalid_request", message, param="messages")
