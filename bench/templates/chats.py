"""The chats that each template renders, and the template's own ids of them: what transformers itself makes. The oracle."""

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


CALL: JsonValue = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = _said("user", "What is the capital of Norway?")
CALLED = _said("assistant", "", tool_calls=[CALL])
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


def own_text(
    tokenizer: PreTrainedTokenizerFast,
    chat: Chat,
    variables: Mapping[str, JsonValue],
    *,
    prompt: bool = False,
) -> str | None:
    """The template's rendering of a chat; `prompt`: of all but its last message, with the generation prompt.

    Content is given as a list of parts if the template drops it as a string. None if the template refuses the chat, or
    drops a text of it.
    """
    messages = chat.messages[:-1] if prompt else chat.messages
    for given in (messages, [_with_parts(message) for message in messages]):
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in given],
                tools=None if chat.tools is None else list(chat.tools),
                tokenize=False,
                add_generation_prompt=prompt,
                **variables,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue
        if all(str(message["content"]) in text for message in messages):
            return str(text)
    return None


def _with_parts(message: Message) -> Message:
    if message["role"] == "tool":
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}


def own_ids(
    tokenizer: PreTrainedTokenizerFast, chat: Chat, variables: Mapping[str, JsonValue], end_id: int | None
) -> list[int] | None:
    """Ids of the template's rendering up to the end of the last turn. The end is added if the template writes none.

    None as own_text is.
    """
    text = own_text(tokenizer, chat, variables)
    if text is None:
        return None
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: Sequence[int] = encoding["input_ids"]
    said = str(chat.messages[-1]["content"]) or "Oslo"
    start = text.rindex(said) + len(said)
    after = [at for at, (first, _) in enumerate(encoding["offset_mapping"]) if first >= start]
    end = next((at for at in after if ids[at] == end_id), None)
    if end is not None:
        return list(ids[: end + 1])
    kept = ids[: after[0]] if after else ids
    return [*kept, *([] if end_id is None else [end_id])]
