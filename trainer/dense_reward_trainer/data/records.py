"""What the data readers exchange: messages, demonstrations, and why a row or a source holds none.

Must not import files, data sets, tokenizers or chat templates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

ChatRole = Literal["system", "user", "assistant", "tool"]
Reason = Literal[
    "not UTF-8",
    "not JSON",
    "wrong type",
    "unknown keys",
    "known layout",
    "two formats",
    "unsupported column",
    "unknown role",
    "lone surrogate",
    "empty prompt",
    "empty response",
    "no response",
    "not to be learnt",
    "empty final_answer",
]
JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
RawRow = Mapping[str, object]

ROLES: Mapping[str, ChatRole] = {role: role for role in get_args(ChatRole)}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; its content is kept verbatim, and is "" where tool calls stand alone.

    `tool_calls`: in OpenAI's form, with parsed arguments. `weight`: 0 for an assistant's turn that must not be learnt.
    """

    role: ChatRole
    content: str
    tool_calls: tuple[Mapping[str, JsonValue], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    weight: Literal[0, 1] = 1

    def as_mapping(self) -> dict[str, JsonValue]:
        """Role, content and the other fields that are set, as a chat template takes them."""
        others: dict[str, JsonValue] = {
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "reasoning_content": self.reasoning_content,
        }
        return {"role": self.role, "content": self.content, **{key: value for key, value in others.items() if value}}


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to learn: `messages` ends with the assistant's response, after one or more others.

    `answer`: the normalised final answer, if there is one. `source`: the place for error messages, such as
    `file.jsonl:17`. `tools`: definitions of tools, in OpenAI's form, that belong to the prompt.
    """

    messages: tuple[ChatMessage, ...]
    answer: str | None
    source: str
    tools: tuple[Mapping[str, JsonValue], ...] = ()

    @property
    def prompt_messages(self) -> tuple[ChatMessage, ...]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the assistant's last message."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a demonstration: its place (lines count from 1), the kind of fault, and the detail.

    `conversion`: as in LineError.
    """

    file: str
    line: int
    reason: Reason
    detail: str
    conversion: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


class DataError(ValueError):
    """A source cannot be used. `bad_lines`: the lines that are not demonstrations, if these are the reason."""

    def __init__(self, message: str, bad_lines: Sequence[BadLine] = ()) -> None:
        super().__init__(message)
        self.bad_lines = tuple(bad_lines)


class LineError(Exception):
    """One line is not a demonstration.

    `conversion`: a Python expression over `rows`, the list of all rows, that gives rows which can be read; "" if only
    the author of the data can write one.
    """

    def __init__(self, reason: Reason, detail: str, conversion: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
        self.conversion = conversion
