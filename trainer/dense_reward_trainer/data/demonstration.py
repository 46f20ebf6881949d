"""Parses one line into a demonstration, a prompt and its response, from any of the formats in _FORMATS.

Pure functions of one line. Must not import files, data sets, tokenizers or chat templates.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Literal, NoReturn, get_args

from dense_reward_trainer.data.final_answers import final_answer, normalise_number

ChatRole = Literal["system", "user", "assistant", "tool"]
Reason = Literal[
    "not UTF-8",
    "not JSON",
    "wrong type",
    "unknown keys",
    "two formats",
    "unsupported column",
    "unknown role",
    "lone surrogate",
    "empty prompt",
    "empty response",
    "no response",
    "empty final_answer",
]
RawRow = Mapping[str, object]

_ROLES: dict[str, ChatRole] = {role: role for role in get_args(ChatRole)}
# Columns that are part of the prompt; ignoring them would train on another prompt than the author intended.
_PROMPT_COLUMNS = ("chat_template_kwargs", "history", "images", "system", "tools")

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; its content is kept verbatim."""

    role: ChatRole
    content: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to learn: `messages` ends with the assistant's response, after one or more others.

    `answer`: the normalised final answer, if there is one. `source`: the place for error messages, such as
    `file.jsonl:17`.
    """

    messages: tuple[ChatMessage, ...]
    answer: str | None
    source: str

    @property
    def prompt_messages(self) -> tuple[ChatMessage, ...]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the assistant's last message."""
        return self.messages[-1].content


class LineError(Exception):
    """One line is not a demonstration."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def parse_line(line: bytes) -> RawRow:
    """The JSON object of one line.

    Raises LineError if the line is not UTF-8, not strict JSON or not an object, or repeats a key.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line") from error
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LineError("not JSON", str(error)) from error
    if not isinstance(value, dict):
        raise LineError("wrong type", f"the line is {_json_type(value)}, an object is needed")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(key for key, _ in pairs)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise LineError("not JSON", f"an object has the same key twice: {_quoted_keys(repeated)}")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("not JSON", f"{name} is not a JSON number")


def read_row(row: RawRow, source: str, strip_annotations: bool = False) -> Demonstration:
    """The demonstration in one row. The keys determine its format; a null value counts as a missing key.

    Raises LineError, with the reason, if the row is not a demonstration.
    """
    filled = {key: value for key, value in row.items() if value is not None}
    unsupported = [column for column in _PROMPT_COLUMNS if filled.get(column)]
    if unsupported:
        detail = f"{_quoted_keys(unsupported)} would change the prompt: put it into `messages`, or remove it"
        raise LineError("unsupported column", detail)
    messages = _format_reader(filled)(filled)
    if messages[-1].role != "assistant":
        raise LineError("no response", f"the last message is by the {messages[-1].role}, not by the assistant")
    response = messages[-1].content
    if strip_annotations:
        response = _ANNOTATION.sub("", response)
    if not response.strip():
        raise LineError("empty response", "the response has no visible character")
    if not any(message.content.strip() for message in messages[:-1]):
        raise LineError("empty prompt", "nothing visible comes before the response")
    answer = _stated_answer(filled["final_answer"]) if "final_answer" in filled else final_answer(response)
    return Demonstration((*messages[:-1], replace(messages[-1], content=response)), answer, source)


def _stated_answer(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise LineError("wrong type", f"`final_answer` is {value}, a finite number is needed")
        return normalise_number(format(Decimal(str(value)), "f"))
    if not isinstance(value, str):
        raise LineError("wrong type", f"`final_answer` is {_json_type(value)}, a string or a number is needed")
    answer = normalise_number(_string(value, "`final_answer`"))
    if not answer:
        raise LineError("empty final_answer", "`final_answer` is blank: state it, or remove the key")
    return answer


def _from_messages(row: RawRow) -> tuple[ChatMessage, ...]:
    return _messages(row["messages"], "messages")


def _from_instruction(row: RawRow) -> tuple[ChatMessage, ...]:
    parts = [_string(row["instruction"], "`instruction`"), _string(row.get("input", ""), "`input`")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return ChatMessage("user", prompt), ChatMessage("assistant", _string(row["output"], "`output`"))


def _from_prompt(row: RawRow, response_key: str) -> tuple[ChatMessage, ...]:
    prompt, response = row["prompt"], row[response_key]
    if not isinstance(prompt, list) and not isinstance(response, list):
        return ChatMessage("user", _string(prompt, "`prompt`")), ChatMessage(
            "assistant", _string(response, f"`{response_key}`")
        )
    answered = _messages(response, response_key)
    if len(answered) != 1:
        # A demonstration has one response, and only its author can decide which of several to learn.
        detail = f"`{response_key}` has {len(answered)} messages, one is needed: `messages` trains on the last one"
        raise LineError("wrong type", detail)
    return *_messages(prompt, "prompt"), *answered


def _from_question(row: RawRow) -> tuple[ChatMessage, ...]:
    question, answer = _string(row["question"], "`question`"), _string(row["answer"], "`answer`")
    return ChatMessage("user", question), ChatMessage("assistant", answer)


_FORMATS: dict[tuple[str, ...], Callable[[RawRow], tuple[ChatMessage, ...]]] = {
    ("messages",): _from_messages,
    ("prompt", "response"): partial(_from_prompt, response_key="response"),
    ("prompt", "completion"): partial(_from_prompt, response_key="completion"),
    ("instruction", "output"): _from_instruction,
    ("question", "answer"): _from_question,
}


def _format_reader(row: RawRow) -> Callable[[RawRow], tuple[ChatMessage, ...]]:
    formats = "; ".join("+".join(keys) for keys in _FORMATS)
    matching = [keys for keys in _FORMATS if row.keys() >= set(keys)]
    if not matching:
        raise LineError("unknown keys", f"has {_quoted_keys(row) or 'none'}, needs one of {formats} (null is missing)")
    if len(matching) > 1:
        both = " and ".join("+".join(keys) for keys in matching)
        raise LineError("two formats", f"has {_quoted_keys(row)}, which reads as {both}: keep one")
    return _FORMATS[matching[0]]


def _messages(value: object, name: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list):
        raise LineError("wrong type", f"`{name}` is {_json_type(value)}, a list of messages is needed")
    if not value:
        raise LineError("empty prompt" if name == "prompt" else "no response", f"`{name}` is an empty list")
    return tuple(_message(item, f"`{name}`[{index}]") for index, item in enumerate(value))


def _message(value: object, name: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise LineError("wrong type", f"{name} is {_json_type(value)}, an object with role and content is needed")
    extra = [key for key, part in value.items() if part is not None and key not in ("role", "content")]
    if extra:
        raise LineError("unknown keys", f"{name} has {_quoted_keys(extra)}, only role and content are understood")
    role = _string(value.get("role"), f"{name}.role")
    if role not in _ROLES:
        raise LineError("unknown role", f"{name}.role is {role!a}, one of {', '.join(_ROLES)} is needed")
    return ChatMessage(_ROLES[role], _string(value.get("content"), f"{name}.content"))


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise LineError("wrong type", f"{name} is {_json_type(value)}, a string is needed")
    surrogate = _SURROGATE.search(value)
    if surrogate:
        found = f"U+{ord(surrogate.group()):04X} at character {surrogate.start() + 1}"
        raise LineError("lone surrogate", f"{name} has {found}, which no UTF-8 text can hold")
    return value


def _quoted_keys(keys: Iterable[str]) -> str:
    return ", ".join(ascii(key) for key in sorted(keys))


def _json_type(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "missing" if value is None else kinds.get(type(value), type(value).__name__)
