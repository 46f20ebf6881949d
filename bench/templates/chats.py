"""The chats that each template renders, and the template's own ids of them: those that transformers itself makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_reward.text.special_tokens import JsonValue, Message
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

ANSWER = "It is Oslo, a city."
TOOL: JsonValue = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _said(role: str, content: JsonValue, **more: JsonValue) -> Message:
    return {"role": role, "content": content, **more}


CALL: JsonValue = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
ASKED = _said("user", "What is the capital of Norway?")
CALLED = _said("assistant", None, tool_calls=[CALL])
RESULT = _said("tool", "4 degrees", tool_call_id="abcdefgh1", name="weather")


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat whose last message, the assistant's, is scored."""

    messages: tuple[Message, ...]
    tools: tuple[JsonValue, ...] | None = None


CHATS: Mapping[str, Chat] = {
    "one turn": Chat((ASKED, _said("assistant", ANSWER))),
    "system": Chat((_said("system", "Be brief."), ASKED, _said("assistant", ANSWER))),
    "several turns": Chat(
        (
            *(_said("user", "Hi"), _said("assistant", "Hello world!"), ASKED),
            *(_said("assistant", "It is Oslo."), _said("user", "What is 12 + 34?"), _said("assistant", ANSWER)),
        )
    ),
    "after a tool": Chat((ASKED, CALLED, RESULT, _said("assistant", ANSWER)), (TOOL,)),
    "calls a tool": Chat((ASKED, CALLED), (TOOL,)),
}


def _as_templates_take_it(message: Message) -> Message:
    return {**message, "content": message["content"] or ""}


def own_texts(
    tokenizer: PreTrainedTokenizerFast, chat: Chat, variables: Mapping[str, JsonValue], *, prompt: bool = False
) -> list[str]:
    """The template's renderings of a chat; `prompt`: of all but its last message, with the generation prompt.

    One with content as strings and one with content as lists of parts. None of a form that the template refuses, or
    from which it drops a text. A time of day is midnight.
    """
    messages = [_as_templates_take_it(m) for m in (chat.messages[:-1] if prompt else chat.messages)]
    found = []
    for given in (messages, [_with_parts(message) for message in messages]):
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in given],
                chat_template=str(tokenizer.chat_template).replace("%H:%M:%S", "00:00:00"),
                tools=None if chat.tools is None else list(chat.tools),
                tokenize=False,
                add_generation_prompt=prompt,
                **variables,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue
        if all(str(message["content"]) in text for message in messages) and "{'type': 'text'" not in text:
            found.append(str(text))
    return found


def _with_parts(message: Message) -> Message:
    if message["role"] == "tool":
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}


def is_own(tokenizer: PreTrainedTokenizerFast, text: str, ids: Sequence[int]) -> bool:
    """Whether ids with an end of turn are those of a rendering, as far as that says what ends the turn.

    The template can write more after the end of turn, but nothing of the chat; if it writes nothing after the response,
    any token ends it.
    """
    own: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    turn, after = list(ids[:-1]), own[len(ids) - 1 :]
    if own[: len(turn)] != turn:
        return False
    rest = tokenizer.decode(after)
    return not rest.strip() or (after[0] == ids[-1] and "Oslo" not in rest)
