"""Parses one line into a demonstration, a prompt and its response, from any layout of layouts.py.

Pure functions of one line. Must not import files, data sets, tokenizers or chat templates.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import cast

from dense_reward_trainer.data.conversions import (
    refuse_known_layout,
    refuse_lost_columns,
    refuse_lost_response,
    unknown_keys,
)
from dense_reward_trainer.data.final_answers import final_answer, normalise_number
from dense_reward_trainer.data.layouts import Layout, formats, matching, prompt_without_response, read_messages
from dense_reward_trainer.data.messages import tools_of
from dense_reward_trainer.data.records import ChatMessage, Demonstration, JsonValue, LineError, RawRow
from dense_reward_trainer.data.row_values import is_empty, json_type, quoted_keys, strict_json, string

# Columns that are a system message, whatever the layout of the rest.
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_TOOL_COLUMNS = ("tools", "functions")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a row was read: its layout, what is to be said about that, and the columns with content that were not."""

    demonstration: Demonstration
    layout: str
    note: str
    not_read: tuple[str, ...]


def parse_line(line: bytes) -> RawRow:
    """The JSON object of one line.

    Raises LineError if the line is not UTF-8, not strict JSON or not an object, or repeats a key.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line") from error
    if text.lstrip().startswith("{'"):
        raise LineError("not JSON", "single quotes are Python's notation: write each row with json.dumps(row)")
    value = strict_json(text)
    if not isinstance(value, dict):
        raise LineError("wrong type", f"the line is {json_type(value)}, an object is needed")
    return value


def read_row(row: RawRow, source: str, *, strip_annotations: bool = False, prompts_only: bool = False) -> Reading:
    """The demonstration in one row. The keys determine its layout; a null value counts as a missing key.

    `prompts_only`: a row without a response is read too; its response is "". Raises LineError, with the reason, if the
    row is not a demonstration, or if it has a column of the prompt whose place in the prompt is not known.
    """
    filled = {key: value for key, value in row.items() if value is not None}
    refuse_known_layout(filled, prompts_only=prompts_only)
    layouts, messages = _read(filled, prompts_only)
    messages = _with_system(filled, messages)
    if prompts_only and messages[-1].role != "assistant":
        messages = (*messages, ChatMessage("assistant", ""))
    else:
        messages = (*messages[:-1], _response(messages[-1], strip_annotations))
    if not any(message.content.strip() or message.tool_calls for message in messages[:-1]):
        raise LineError("empty prompt", "nothing visible comes before the response")
    tools = _tools(filled)
    read = {
        *_SYSTEM_COLUMNS,
        *_TOOL_COLUMNS,
        "final_answer",
        *(key for one in layouts for key in (*one.keys, *one.also)),
    }
    unread = tuple(key for key, value in filled.items() if key not in read and not is_empty(value))
    refuse_lost_columns(filled, unread, layouts, messages[:-1])
    if messages[-1].content:
        refuse_lost_response(filled, unread, layouts, messages[-1])
    _refuse_tools_twice(tools, messages)
    response = messages[-1].content
    answer = _stated_answer(filled["final_answer"]) if "final_answer" in filled else final_answer(response)
    name = " and ".join(layout.name for layout in layouts)
    return Reading(Demonstration(messages, answer, source, tools), name, layouts[0].note, unread)


def _read(row: RawRow, prompts_only: bool) -> tuple[tuple[Layout, ...], tuple[ChatMessage, ...]]:
    if matching(row):
        return read_messages(row)
    alone = prompt_without_response(row) if prompts_only else None
    if alone is None:
        raise unknown_keys(row, formats())
    return (alone[0],), alone[1]


def _response(message: ChatMessage, strip_annotations: bool) -> ChatMessage:
    if message.role != "assistant":
        raise LineError("no response", f"the last message is by the {message.role}, not by the assistant")
    if message.weight == 0:
        raise LineError("not to be learnt", "the last response has weight 0: end the chat before it, or remove the row")
    content = _ANNOTATION.sub("", message.content) if strip_annotations else message.content
    if not content.strip() and not message.tool_calls:
        raise LineError("empty response", "the response has no visible character")
    return replace(message, content=content)


def _with_system(row: RawRow, messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """The messages after the text of a system column, which must not differ from a system message among them."""
    given = {key: string(row[key], f"`{key}`") for key in _SYSTEM_COLUMNS if not is_empty(row.get(key))}
    held = {message.content.strip() for message in messages if message.role == "system"}
    stated = {text.strip() for text in given.values()}
    if len(stated) > 1 or (held and stated and stated != held):
        detail = f"{quoted_keys(given)} differs from another system message of the row: keep one of them"
        raise LineError("unsupported column", detail)
    if not given or held:
        return messages
    return ChatMessage("system", next(iter(given.values()))), *messages


def _tools(row: RawRow) -> tuple[Mapping[str, JsonValue], ...]:
    given: Sequence[str] = [key for key in _TOOL_COLUMNS if not is_empty(row.get(key))]
    if len(given) > 1:
        raise LineError("unsupported column", f"has {quoted_keys(given)}: keep `tools`, the newer form")
    return tools_of(row[given[0]], given[0]) if given else ()


def _refuse_tools_twice(tools: Sequence[Mapping[str, JsonValue]], messages: Sequence[ChatMessage]) -> None:
    """Raises LineError if a system message defines all tools already: the chat template would write them again."""
    names = [str(cast(Mapping[str, JsonValue], tool["function"]).get("name")) for tool in tools]
    texts = [message.content for message in messages if message.role == "system"]
    if names and any(
        all(re.search(rf"""['"]name['"]\s*:\s*['"]{re.escape(n)}['"]""", text) for n in names) for text in texts
    ):
        raise LineError(
            "unsupported column",
            "the system message defines the tools, and the chat template would write those of the column `tools` too: "
            "name `tools` in ignore_columns (beside `source`), or take the definitions out of the message",
        )


def _stated_answer(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise LineError("wrong type", f"`final_answer` is {value}, a finite number is needed")
        return normalise_number(format(Decimal(str(value)), "f"))
    if not isinstance(value, str):
        raise LineError("wrong type", f"`final_answer` is {json_type(value)}, a string or a number is needed")
    answer = normalise_number(string(value, "`final_answer`"))
    if not answer:
        raise LineError("empty final_answer", "`final_answer` is blank: state it, or remove the key")
    return answer
