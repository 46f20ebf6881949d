"""One demonstration: a prompt and its response, and the line formats that are understood as one.

Pure functions of one line. Must not know files, data sets, tokenizers or chat templates.
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

Role = Literal["system", "user", "assistant", "tool"]
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
Row = Mapping[str, object]

_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
# Without these the demonstration would have another prompt than its author meant.
_PROMPT_COLUMNS = ("chat_template_kwargs", "history", "images", "system", "tools")

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat, its content verbatim."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to learn: `messages` ends with the assistant's response, at least one comes before.

    `answer` is the final answer, normalised, where the source states one. `source` is the place, as in
    `file.jsonl:17`, for messages to people.
    """

    messages: tuple[Message, ...]
    answer: str | None
    source: str

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the assistant's last message."""
        return self.messages[-1].content


class LineError(Exception):
    """One line is no demonstration."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def parse_line(line: bytes) -> Row:
    """The JSON object of one line.

    Raises LineError when the line is not UTF-8, not strict JSON, no object, or has the same key twice.
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
        raise LineError("wrong type", f"the line is {_kind(value)}, an object is needed")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(key for key, _ in pairs)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise LineError("not JSON", f"an object has the same key twice: {_names(repeated)}")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("not JSON", f"{name} is no JSON number")


def read_row(row: Row, source: str, strip_annotations: bool = False) -> Demonstration:
    """The demonstration in one row, its format told by its keys; null values count as missing keys.

    Raises LineError with the reason when the row is no demonstration.
    """
    filled = {key: value for key, value in row.items() if value is not None}
    unsupported = [column for column in _PROMPT_COLUMNS if filled.get(column)]
    if unsupported:
        detail = f"{_names(unsupported)} would change the prompt: put it into `messages`, or remove it"
        raise LineError("unsupported column", detail)
    messages = _reader(filled)(filled)
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
        raise LineError("wrong type", f"`final_answer` is {_kind(value)}, a string or a number is needed")
    answer = normalise_number(_text(value, "`final_answer`"))
    if not answer:
        raise LineError("empty final_answer", "`final_answer` is blank: state it, or remove the key")
    return answer


def _from_messages(row: Row) -> tuple[Message, ...]:
    return _messages(row["messages"], "messages")


def _from_instruction(row: Row) -> tuple[Message, ...]:
    parts = [_text(row["instruction"], "`instruction`"), _text(row.get("input", ""), "`input`")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return Message("user", prompt), Message("assistant", _text(row["output"], "`output`"))


def _from_prompt(row: Row, response_key: str) -> tuple[Message, ...]:
    prompt, response = row["prompt"], row[response_key]
    if not isinstance(prompt, list) and not isinstance(response, list):
        return Message("user", _text(prompt, "`prompt`")), Message("assistant", _text(response, f"`{response_key}`"))
    answered = _messages(response, response_key)
    if len(answered) != 1:
        # A demonstration has one response; which of several to learn is the author's to say.
        detail = f"`{response_key}` has {len(answered)} messages, one is needed: `messages` trains on the last one"
        raise LineError("wrong type", detail)
    return *_messages(prompt, "prompt"), *answered


def _from_question(row: Row) -> tuple[Message, ...]:
    question, answer = _text(row["question"], "`question`"), _text(row["answer"], "`answer`")
    return Message("user", question), Message("assistant", answer)


_FORMATS: dict[tuple[str, ...], Callable[[Row], tuple[Message, ...]]] = {
    ("messages",): _from_messages,
    ("prompt", "response"): partial(_from_prompt, response_key="response"),
    ("prompt", "completion"): partial(_from_prompt, response_key="completion"),
    ("instruction", "output"): _from_instruction,
    ("question", "answer"): _from_question,
}


def _reader(row: Row) -> Callable[[Row], tuple[Message, ...]]:
    understood = "; ".join("+".join(keys) for keys in _FORMATS)
    matching = [keys for keys in _FORMATS if row.keys() >= set(keys)]
    if not matching:
        raise LineError("unknown keys", f"has {_names(row) or 'none'}, needs one of {understood} (null is missing)")
    if len(matching) > 1:
        both = " and ".join("+".join(keys) for keys in matching)
        raise LineError("two formats", f"has {_names(row)}, which reads as {both}: keep one")
    return _FORMATS[matching[0]]


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineError("wrong type", f"`{name}` is {_kind(value)}, a list of messages is needed")
    if not value:
        raise LineError("empty prompt" if name == "prompt" else "no response", f"`{name}` is an empty list")
    return tuple(_message(item, f"`{name}`[{index}]") for index, item in enumerate(value))


def _message(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise LineError("wrong type", f"{name} is {_kind(value)}, an object with role and content is needed")
    extra = [key for key, part in value.items() if part is not None and key not in ("role", "content")]
    if extra:
        raise LineError("unknown keys", f"{name} has {_names(extra)}, only role and content are understood")
    role = _text(value.get("role"), f"{name}.role")
    if role not in _ROLES:
        raise LineError("unknown role", f"{name}.role is {role!a}, one of {', '.join(_ROLES)} is needed")
    return Message(_ROLES[role], _text(value.get("content"), f"{name}.content"))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise LineError("wrong type", f"{name} is {_kind(value)}, a string is needed")
    surrogate = _SURROGATE.search(value)
    if surrogate:
        found = f"U+{ord(surrogate.group()):04X} at character {surrogate.start() + 1}"
        raise LineError("lone surrogate", f"{name} has {found}, which no UTF-8 text can hold")
    return value


def _names(keys: Iterable[str]) -> str:
    return ", ".join(ascii(key) for key in sorted(keys))


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "missing" if value is None else kinds.get(type(value), type(value).__name__)
