"""An assistant's turn as its chat template writes it: what a policy generates after the generation prompt. Pure.

For turns that are more than text, such as tool calls. The template's own rendering of the chat with the turn begins
with that of the chat before it, and what follows is the turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_reward.errors import RequestError, refuse
from dense_reward.text.messages import text_of
from dense_reward.text.offsets import Span, monotone_spans
from dense_reward.text.rendering import EscapedChat, RendersChats
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.template import MARK


@dataclass(frozen=True, slots=True)
class WrittenTurn:
    """The text of a turn without its end, and the ids of the turn with their spans in that text."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]


def after_prompt(prompt: str, whole: str) -> str:
    """What `whole`, the rendering of a chat, has after `prompt`, that of the chat before its last turn.

    Raises RequestError(bad_template) if it does not begin with the prompt: then no text can follow the prompt as the
    template writes it.
    """
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    raise refuse(
        "bad_template",
        f"the chat template writes the last turn where its generation prompt has other text: {prompt[same:][:60]!r} "
        f"before a response, {whole[same:][:60]!r} in the finished chat: send ids",
        param="messages",
    )


def elsewhere(chat: EscapedChat, prompt: str, mark: str, continues: bool) -> tuple[str, str] | None:
    """What stands between the last message and a response: in `prompt`, and in the template's own rendering.

    A template whose two renderings agree on a plain chat can differ after a tool's result. `mark` ends the last
    message. None if both have the same ids, or if the template renders no answer to this chat, or without that message.
    """
    try:
        answered: list[Message] = [*chat.messages, {"role": "assistant", "content": MARK}]
        own = chat.render(generation_prompt=False, messages=answered).rpartition(MARK)[0].rpartition(mark)[2]
    except RequestError:
        return None
    before = prompt.rpartition(mark)[2]
    if before == own or mark not in prompt or not own:
        return None
    encode = chat.tokenizer.encode
    apart = encode(before, special=True, continues=True).ids + encode(MARK, special=False, continues=continues).ids
    return None if encode(own + MARK, special=True, continues=True).ids == apart else (before, own)


def is_joined(chat: EscapedChat, turn_ids: Sequence[int], continues: bool) -> bool:
    """Whether the rendering of a chat, tokenised as one text, has other ids than its prompt and its last turn."""
    prompt = chat.render(generation_prompt=True, messages=chat.messages[:-1])
    ids = [*_encoded(chat.escaper.split(prompt), chat.tokenizer, False)[1], *turn_ids]
    whole = _encoded(chat.escaper.split(chat.render(generation_prompt=False)), chat.tokenizer, False)[1]
    return whole[: len(ids)] != ids


def thought_and_answer(chat: EscapedChat, end: str) -> list[tuple[str, bool]]:
    """The last message, a thought and an answer, as the template writes it before its end of turn `end`, in parts.

    See SpecialTokenEscaper.split. Raises RequestError(bad_template) if the template leaves a part of the message out.
    """
    whole = chat.render(generation_prompt=False)
    turn = after_prompt(chat.render(generation_prompt=True, messages=chat.messages[:-1]), whole)
    _refuse_unwritten(chat.messages[-1], turn)
    _refuse_second_prompt(chat, whole)
    return chat.escaper.split(turn.partition(end)[0] if end else turn)


def written_turn(
    chat: EscapedChat, *, with_end: bool, continues: bool = False, at_most: int | None = None
) -> WrittenTurn:
    """The last message of a chat as the template writes it; `with_end`: with the token that ends it.

    `continues` and `at_most`: see Tokenizer.encode.

    That token has an empty span at the end of the text. Raises RequestError(bad_template) if the template leaves a part
    of the message out, or if no token ends the turn.
    """
    whole = chat.render(generation_prompt=False)
    turn = after_prompt(chat.render(generation_prompt=True, messages=chat.messages[:-1]), whole)
    _refuse_unwritten(chat.messages[-1], turn)
    _refuse_second_prompt(chat, whole)
    text, ids, spans, last_special = _encoded(chat.escaper.split(turn), chat.tokenizer, continues, at_most)
    end_id = None
    if last_special is not None and not text[spans[last_special][1] :].strip() and _ends_turns(chat):
        text, end_id = text[: spans[last_special][0]], ids[last_special]
        ids, spans = ids[:last_special], spans[:last_special]
    if not with_end:
        return WrittenTurn(text, tuple(ids), tuple(spans))
    end_id = _next_header(chat, whole) if end_id is None else end_id
    if end_id is None:
        message = "the chat template writes no end of turn after this response: send add_eos false, or ids"
        raise refuse("bad_template", message, param="add_eos")
    return WrittenTurn(text, (*ids, end_id), (*spans, (len(text), len(text))))


def _encoded(
    parts: Sequence[tuple[str, bool]], tokenizer: RendersChats, continues: bool, at_most: int | None = None
) -> tuple[str, list[int], list[Span], int | None]:
    """Text, ids and spans of a rendering's parts, and the index of the template's last special token."""
    ids: list[int] = []
    spans: list[Span] = []
    last_special = None
    start = 0
    for part, of_template in parts:
        joined = ids[-1] not in tokenizer.special_ids if ids else continues
        pieces = tokenizer.encode(part, special=of_template, continues=joined, at_most=at_most)
        for token, (first, last) in zip(pieces.ids, monotone_spans(pieces.offsets, len(part)), strict=True):
            if of_template and token in tokenizer.special_ids:
                last_special = len(ids)
            ids.append(token)
            spans.append((start + first, start + last))
        start += len(part)
    return "".join(part for part, _ in parts), ids, spans, last_special


def _refuse_unwritten(message: Message, turn: str) -> None:
    """Raise RequestError(bad_template) if the turn lacks a part of its message."""
    thoughts = {key: message.get(key) for key in ("reasoning_content", "thinking")}
    texts = {key: thought for key, thought in thoughts.items() if isinstance(thought, str)}
    texts["content"] = text_of(message)
    missing = [name for name, text in texts.items() if text.strip() not in turn]
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence) and not all(_is_written(call, turn) for call in calls):
        missing.append("tool_calls")
    if missing:
        raise refuse(
            "bad_template",
            f"the chat template does not write {missing[0]} of the last message as it was sent: no policy behind this "
            "template answers like this; send what the policy generated, verbatim as content or as ids",
            param="messages",
        )


def _refuse_second_prompt(chat: EscapedChat, whole: str) -> None:
    """Raise RequestError(bad_template) if the template writes the same generation prompt, or none, in every case.

    Then a chat ends alike after the user and after the assistant, and nothing tells where the turn ends (Cohere).
    """
    if chat.render(generation_prompt=True) != whole:
        return
    user, assistant = _after_mark(chat, "user").strip(), _after_mark(chat, "assistant").strip()
    if user and assistant.endswith(user):
        raise refuse(
            "bad_template",
            "the chat template ignores add_generation_prompt, so where this response begins and ends is not known: "
            "send what the policy generated, verbatim as content or as ids",
            param="messages",
        )


def _is_written(call: JsonValue, turn: str) -> bool:
    """Whether the turn has the call's name. Some templates write its id instead."""
    assert isinstance(call, Mapping)
    function = call["function"]
    assert isinstance(function, Mapping)
    return any(isinstance(name, str) and name in turn for name in (function["name"], call.get("id")))


def _ends_turns(chat: EscapedChat) -> bool:
    """Whether the template ends a turn of plain text with a special token. Then the last one of any turn is its end."""
    return _first_special(_after_mark(chat, "assistant"), chat.tokenizer) is not None


def _after_mark(chat: EscapedChat, speaker: str) -> str:
    """What the template writes after the text of the last message, with that of the user or of the assistant."""
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    turns = turns[: 1 if speaker == "user" else 2]
    mark = "DenseRewardMark"
    marked = [*turns[:-1], {**turns[-1], "content": mark}]
    return chat.render(generation_prompt=False, messages=marked).partition(mark)[2]


def _next_header(chat: EscapedChat, whole: str) -> int | None:
    """The special token that opens a tool's result. Policies stop at it where templates write no end of turn (GLM)."""
    result: Message = {"role": "tool", "content": "a", "tool_call_id": "a"}
    try:
        longer = chat.render(generation_prompt=False, messages=[*chat.messages, result])
    except RequestError:
        return None
    return _first_special(longer[len(whole) :], chat.tokenizer) if longer.startswith(whole) else None


def _first_special(text: str, tokenizer: RendersChats) -> int | None:
    ids = tokenizer.encode(text.lstrip(), special=True).ids
    return ids[0] if ids and ids[0] in tokenizer.special_ids else None
