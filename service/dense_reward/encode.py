"""Text -> ids: the one rule for training and scoring. Pure; takes a tokenizer through a Protocol.

ids = tokenise(rendered prompt) + tokenise(response) + end of turn, tokenised separately and never joined, exactly as a
policy would have produced them. What a template puts after the end of turn is not scored. Special-token strings inside
text that is rendered here are plain text; in raw text they are the special tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dense_reward.engine.base import BoolArray, IdArray
from dense_reward.errors import refuse
from dense_reward.guard import Guard, JsonValue, Message

Span = tuple[int, int]
RendererName = Literal["chat", "plain", "instruction"]
PLAIN_FORMATS: Mapping[str, str] = {
    "plain": "{prompt}\n",
    # the template of SPIN (arXiv 2401.01335, appendix B)
    "instruction": "### Instruction: {prompt}\n\n### Response: ",
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """Token ids of a text and the code-point span that the tokenizer gives each (these may overlap or leave gaps)."""

    ids: tuple[int, ...]
    offsets: tuple[Span, ...]


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer; `bos_id` is set only where the tokenizer itself puts one before a text."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def special_strings(self) -> tuple[str, ...]: ...

    def encode(self, text: str, *, special: bool) -> Pieces:
        """Ids without any that the tokenizer would add; `special`: special-token strings become their ids."""
        ...

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str:
        """The chat template's text. Raises RequestError(bad_template) where the template refuses."""
        ...

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        """Decoded text and monotone, gapless spans; a character split over tokens belongs to its last token."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id decoded alone."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """The ids after a prompt, which of them are scored, and for each scored id its span in `text` (None for ids)."""

    ids_T: IdArray
    scored_T: BoolArray
    text: str | None = None
    spans_S: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt of at least one id and the responses that share it."""

    prompt_P: IdArray
    responses: tuple[EncodedResponse, ...]


def as_ids(ids: Sequence[int], vocabulary: int, param: str) -> IdArray:
    """Ids verbatim as int32. Raises RequestError(unknown_token_id) for one outside [0, vocabulary)."""
    try:
        array = np.array(ids, dtype=np.int64)
    except OverflowError:
        array = np.array([min(max(i, -1), vocabulary) for i in ids], dtype=np.int64)
    unknown = np.flatnonzero((array < 0) | (array >= vocabulary))
    if len(unknown):
        at = int(unknown[0])
        message = f"{param}: id {ids[at]} at position {at} is not in the vocabulary [0, {vocabulary})"
        raise refuse("unknown_token_id", message, param=param)
    return array.astype(np.int32)


def monotone_spans(offsets: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Spans without gaps or overlap that cover [0, length).

    A boundary lies where a token ends, or earlier where the next one starts inside the same character, so that a
    character split over tokens belongs to its last token and skipped text to the token that follows it.
    """
    spans: list[Span] = []
    start = 0
    for index, (_, end) in enumerate(offsets):
        last = index == len(offsets) - 1
        boundary = length if last else max(start, min(end, offsets[index + 1][0], length))
        spans.append((start, boundary))
        start = boundary
    return tuple(spans)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with the renderer that its model was trained with."""

    tokenizer: Tokenizer
    renderer: RendererName
    end_of_turn_id: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, renderer: RendererName) -> "Encoder":
        return cls(tokenizer, renderer, end_of_turn_id(tokenizer, renderer))

    def prompt(self, prompt: str, *, raw: bool = False) -> IdArray:
        """Ids of a prompt: rendered as one user turn, or taken as rendered already where `raw`."""
        if raw:
            return self._with_bos(self.tokenizer.encode(prompt, special=True).ids)
        if not prompt and self.tokenizer.bos_id is None:
            raise refuse(
                "empty_prompt", "prompt is empty and the tokenizer has no BOS: give at least one token", param="prompt"
            )
        if self.renderer == "chat":
            return self.chat_prompt([{"role": "user", "content": prompt}])
        before, after = PLAIN_FORMATS[self.renderer].split("{prompt}")
        return self._with_bos(self.tokenizer.encode(before + prompt + after, special=False).ids)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> IdArray:
        """Ids of a chat up to the point where the assistant answers."""
        if self.renderer != "chat":
            return self.prompt(_single_user_turn(messages, self.renderer))
        guard = Guard(self.tokenizer.special_strings, (messages, tools))
        guarded = [_guarded_message(message, guard) for message in messages]
        rendered = self.tokenizer.render_chat(
            guarded, generation_prompt=True, tools=_guarded_tools(tools, guard), template_kwargs=template_kwargs
        )
        return np.array(self._rendered_ids(rendered, guard), dtype=np.int32)

    def response(self, text: str, *, add_eos: bool, raw: bool = False) -> EncodedResponse:
        """Ids of a response, ended by the end of turn where `add_eos`; its span is empty, at the end of the text."""
        pieces = self.tokenizer.encode(text, special=raw)
        spans = monotone_spans(pieces.offsets, len(text))
        ids = list(pieces.ids)
        if add_eos:
            ids.append(self._end_of_turn())
            spans = (*spans, (len(text), len(text)))
        return EncodedResponse(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), text, spans)

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        add_eos: bool,
        every_turn: bool = False,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> Encoded:
        """A chat that ends with the assistant: its last response is scored, or with `every_turn` all of them."""
        if not messages or messages[-1].get("role") != "assistant":
            raise refuse("invalid_request", "messages must end with the assistant's response", param="messages")
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        scored = turns if every_turn else turns[-1:]
        first = scored[0]
        if first == 0:
            raise refuse("empty_prompt", "messages hold nothing before the assistant's response", param="messages")
        prompt_P = self.chat_prompt(messages[:first], tools, template_kwargs)
        stream = _Stream()
        for index, turn in enumerate(scored):
            if index:
                previous = scored[index - 1]
                stream.context(self._between(messages, previous, turn, tools, template_kwargs, ended=add_eos))
            stream.response(self.response(_content(messages[turn]), add_eos=add_eos))
        return Encoded(prompt_P, (stream.finish(),))

    def text(self, text: str, *, add_eos: bool, raw: bool) -> Encoded:
        """A whole text: every token after the first is scored (after BOS, where the tokenizer has one)."""
        pieces = self.tokenizer.encode(text, special=raw)
        spans = monotone_spans(pieces.offsets, len(text))
        ids = list(self._with_bos(pieces.ids))
        spans = ((0, 0),) * (len(ids) - len(spans)) + spans
        if add_eos:
            ids.append(self._end_of_turn())
            spans = (*spans, (len(text), len(text)))
        if not ids:
            raise refuse("empty_prompt", "text is empty: nothing can be scored", param="text")
        response = EncodedResponse(
            np.array(ids[1:], dtype=np.int32), np.ones(len(ids) - 1, dtype=bool), text, _gapless(spans[1:])
        )
        return Encoded(np.array(ids[:1], dtype=np.int32), (response,))

    def _between(
        self,
        messages: Sequence[Message],
        previous: int,
        turn: int,
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue] | None,
        *,
        ended: bool,
    ) -> list[int]:
        """Ids that the template puts between two responses; where the first `ended`, without its end of turn.

        The state in which the second response is scored must be the one that a policy would see, so a template that
        renders earlier turns differently once the conversation goes on is refused.
        """
        if self.renderer != "chat":
            raise refuse("bad_template", f"the {self.renderer} renderer knows one turn: score turns one by one")
        guard = Guard(self.tokenizer.special_strings, (messages, tools))
        guarded = [_guarded_message(message, guard) for message in messages]
        safe_tools = _guarded_tools(tools, guard)

        def rendered(count: int) -> str:
            return self.tokenizer.render_chat(
                guarded[:count], generation_prompt=True, tools=safe_tools, template_kwargs=template_kwargs
            )

        start = rendered(previous) + _content(guarded[previous])
        whole = rendered(turn)
        if not whole.startswith(start):
            raise refuse(
                "bad_template",
                "the chat template renders earlier turns differently once a conversation goes on, so all_assistant "
                'would score states that no policy sees: send each turn with score "last", or send ids',
                param="score",
            )
        ids = self._rendered_ids(whole[len(start) :], guard)
        return ids[1:] if ended and ids and ids[0] == self.end_of_turn_id else ids

    def _rendered_ids(self, rendered: str, guard: "Guard") -> list[int]:
        ids: list[int] = []
        for text, special in guard.split(rendered):
            ids.extend(self.tokenizer.encode(text, special=special).ids)
        return ids

    def _end_of_turn(self) -> int:
        if self.end_of_turn_id is None:
            raise refuse(
                "bad_template", "the tokenizer has no end-of-sequence token: send add_eos false", param="add_eos"
            )
        return self.end_of_turn_id

    def _with_bos(self, ids: Sequence[int]) -> IdArray:
        bos = self.tokenizer.bos_id
        if bos is not None and (not ids or ids[0] != bos):
            ids = (bos, *ids)
        return np.array(ids, dtype=np.int32)


def end_of_turn_id(tokenizer: Tokenizer, renderer: RendererName) -> int | None:
    """The id that ends a response: the special token that the template puts after it, else the tokenizer's EOS."""
    if renderer == "chat":
        mark = "DenseRewardMark"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        after = tokenizer.render_chat(turns, generation_prompt=False).partition(mark)[2]
        ids = tokenizer.encode(after, special=True).ids
        if ids and ids[0] in tokenizer.special_ids:
            return ids[0]
    return tokenizer.eos_id


class _Stream:
    """Scored responses and unscored context, laid one after the other."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._scored: list[bool] = []
        self._text = ""
        self._spans: list[Span] = []

    def context(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._scored.extend([False] * len(ids))

    def response(self, encoded: EncodedResponse) -> None:
        shift = len(self._text)
        self._ids.extend(int(i) for i in encoded.ids_T)
        self._scored.extend([True] * len(encoded.ids_T))
        self._text += encoded.text or ""
        self._spans.extend((start + shift, end + shift) for start, end in encoded.spans_S or ())

    def finish(self) -> EncodedResponse:
        return EncodedResponse(
            np.array(self._ids, dtype=np.int32), np.array(self._scored, dtype=bool), self._text, tuple(self._spans)
        )


def _gapless(spans: Sequence[Span]) -> tuple[Span, ...]:
    return ((0, spans[0][1]), *spans[1:]) if spans else ()


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise refuse("invalid_request", "message content must be a string", param="messages")
    return content


def _guarded_message(message: Message, guard: Guard) -> Message:
    return {key: value if key == "role" else guard.hide(value) for key, value in message.items()}


def _guarded_tools(tools: Sequence[JsonValue] | None, guard: Guard) -> list[JsonValue] | None:
    return None if tools is None else [guard.hide(tool) for tool in tools]


def _single_user_turn(messages: Sequence[Message], renderer: str) -> str:
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise refuse(
            "bad_template",
            f"the {renderer} renderer takes one user message and one response: "
            "train with a chat template for longer chats, or send ids",
            param="messages",
        )
    return _content(messages[0])


__all__ = [
    "PLAIN_FORMATS",
    "Encoded",
    "EncodedResponse",
    "Encoder",
    "Pieces",
    "Tokenizer",
    "as_ids",
    "monotone_spans",
]
