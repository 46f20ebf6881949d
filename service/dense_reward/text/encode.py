"""Text -> ids, by one rule for training and scoring. Pure; takes a tokenizer through a Protocol.

ids = tokenise(rendered prompt) + tokenise(response) + end of turn. The parts are tokenised separately, never as one
text, because a policy generates its response after the ids of the prompt. Text that a template puts after the end of
turn is not scored. Special-token strings inside text that is rendered here are plain text; in raw text they are the
special tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dense_reward.errors import refuse
from dense_reward.records import BoolArray, IdArray
from dense_reward.text.marks import refuse_lost
from dense_reward.text.messages import canonical, text_of
from dense_reward.text.offsets import Span, monotone_spans
from dense_reward.text.rendering import EscapedChat
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.turns import written_turn

RendererName = Literal["chat", "plain", "instruction"]
PLAIN_FORMATS: Mapping[str, str] = {
    "plain": "{prompt}\n",
    # The template of SPIN (arXiv 2401.01335, appendix B).
    "instruction": "### Instruction: {prompt}\n\n### Response: ",
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """Token ids of a text, and the code-point span of each from the tokenizer. Spans can overlap or leave gaps."""

    ids: tuple[int, ...]
    offsets: tuple[Span, ...]


class Tokenizer(Protocol):
    """What encoding needs from a tokenizer. `bos_id` is set only if the tokenizer itself adds it before a text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def special_strings(self) -> tuple[str, ...]: ...
    @property
    def longest_token_bytes(self) -> int:
        """An upper bound on the UTF-8 bytes of text that one token encodes: see Encoder.max_tokens."""
        ...

    def encode(self, text: str, *, special: bool) -> Pieces:
        """Ids without BOS or any other that the tokenizer adds. `special`: special-token strings become their ids."""
        ...

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str:
        """The text of the chat template. Raises RequestError(bad_template) if the template fails."""
        ...

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        """Decoded text and the span of each id: see offsets.decoded_spans."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, decoded separately."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """The ids after a prompt, which of them are scored, and the span of each scored id in `text`. No text for ids."""

    ids_T: IdArray
    scored_T: BoolArray
    text: str | None = None
    spans_S: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt and the responses that share it. Raises RequestError(empty_prompt) for a prompt without ids."""

    prompt_P: IdArray
    responses: tuple[EncodedResponse, ...]

    def __post_init__(self) -> None:
        if len(self.prompt_P) == 0:
            raise refuse("empty_prompt", "the prompt has no tokens: give at least one", param="prompt")


def as_ids(ids: Sequence[int], vocab_size: int, param: str) -> IdArray:
    """Ids verbatim as int32. Raises RequestError(unknown_token_id) for one outside [0, vocab_size)."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        at = next(at for at, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"{param}: id {ids[at]} at position {at} is not in the vocabulary [0, {vocab_size})"
        raise refuse("unknown_token_id", message, param=param)
    return np.array(ids, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with the renderer that its model was trained with.

    If `max_tokens` is set, anything longer is refused as too_long. A text with more bytes than `max_tokens` of the
    longest tokens can hold is refused before it is tokenised, even if the tokenizer would skip most of it.
    """

    tokenizer: Tokenizer
    renderer: RendererName
    end_of_turn_id: int | None
    max_tokens: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, renderer: RendererName) -> "Encoder":
        return cls(tokenizer, renderer, end_of_turn_id(tokenizer, renderer))

    def prompt(self, prompt: str, *, raw: bool = False) -> IdArray:
        """Ids of a prompt. It is rendered as one user turn; `raw`: it is rendered already."""
        if raw:
            return self._with_bos(self._encode(prompt, "prompt", special=True).ids)
        if not prompt and self.tokenizer.bos_id is None:
            raise refuse(
                "empty_prompt", "prompt is empty and the tokenizer has no BOS: give at least one token", param="prompt"
            )
        if self.renderer == "chat":
            return self._chat([{"role": "user", "content": prompt}], None, None, "prompt")
        before, after = PLAIN_FORMATS[self.renderer].split("{prompt}")
        return self._with_bos(self._encode(before + prompt + after, "prompt", special=False).ids)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> IdArray:
        """Ids of a chat up to the point where the assistant answers. Raises RequestError if a message would be lost."""
        messages = canonical(messages)
        if self.renderer != "chat":
            if tools or template_kwargs:
                message = f"the {self.renderer} renderer has no place for tools and template_kwargs: omit them"
                raise refuse("bad_template", message, param="tools" if tools else "template_kwargs")
            return self.prompt(_single_user_turn(messages, self.renderer))
        ids = self._chat(messages, tools, template_kwargs, "messages")
        refuse_lost(self.tokenizer, messages, tools, template_kwargs)
        return ids

    def _chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue] | None,
        param: str,
    ) -> IdArray:
        chat = EscapedChat.of(self.tokenizer, messages, tools, template_kwargs)
        parts = chat.escaper.split(chat.render(generation_prompt=True))
        self._check_bytes([text for text, _ in parts], param)
        ids = [i for text, special in parts for i in self.tokenizer.encode(text, special=special).ids]
        self._check_tokens(len(ids), param)
        return np.array(ids, dtype=np.int32)

    def response(self, text: str, *, add_eos: bool, raw: bool = False) -> EncodedResponse:
        """Ids of a response. `add_eos` appends the end of turn, with an empty span at the end of the text."""
        pieces = self._encode(text, "response", special=raw)
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
        """A chat that ends with the assistant. Its last response is scored; with `every_turn`, all of them.

        Each response is scored after the ids that a policy would see, or refused: see _TurnStream.context.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise refuse("invalid_request", "messages must end with the assistant's response", param="messages")
        messages = canonical(messages)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        scored = turns if every_turn else turns[-1:]
        if scored[0] == 0:
            message = "messages hold nothing before the response to score: put the user's message before it"
            raise refuse("empty_prompt", message, param="messages")
        # Start with the longest prompt: if it is too long, the others need not be rendered.
        longest_P = self.chat_prompt(messages[: scored[-1]], tools, template_kwargs)
        stream = _TurnStream()
        for turn in scored:
            last = turn == scored[-1]
            stream.context(longest_P if last else self.chat_prompt(messages[:turn], tools, template_kwargs))
            stream.response(self._turn(messages[: turn + 1], tools, template_kwargs, add_eos=add_eos))
            self._check_tokens(stream.length, "messages")
        return stream.finish()

    def _turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue] | None,
        *,
        add_eos: bool,
    ) -> EncodedResponse:
        """The last message as a policy writes it: its text, or with tool calls the template's rendering of it."""
        if "tool_calls" not in messages[-1]:
            return self.response(_response_text(messages[-1]), add_eos=add_eos)
        if self.renderer != "chat":
            message = f"the {self.renderer} renderer has no place for tool_calls: send what the policy wrote as content"
            raise refuse("bad_template", message, param="messages")
        turn = written_turn(EscapedChat.of(self.tokenizer, messages, tools, template_kwargs), with_end=add_eos)
        return EncodedResponse(
            np.array(turn.ids, dtype=np.int32), np.ones(len(turn.ids), dtype=bool), turn.text, turn.spans
        )

    def text(self, text: str, *, add_eos: bool, raw: bool) -> Encoded:
        """A whole text: every token after the first is scored. The first is BOS if the tokenizer has one."""
        pieces = self._encode(text, "text", special=raw)
        spans = monotone_spans(pieces.offsets, len(text))
        ids = list(self._with_bos(pieces.ids))
        spans = ((0, 0),) * (len(ids) - len(spans)) + spans
        if add_eos:
            ids.append(self._end_of_turn())
            spans = (*spans, (len(text), len(text)))
        if not ids:
            raise refuse("empty_prompt", "text is empty: nothing can be scored", param="text")
        response = EncodedResponse(
            np.array(ids[1:], dtype=np.int32), np.ones(len(ids) - 1, dtype=bool), text, _from_zero(spans[1:])
        )
        return Encoded(np.array(ids[:1], dtype=np.int32), (response,))

    def _encode(self, text: str, param: str, *, special: bool) -> Pieces:
        """Raises RequestError(too_long)."""
        self._check_bytes([text], param)
        pieces = self.tokenizer.encode(text, special=special)
        self._check_tokens(len(pieces.ids), param)
        return pieces

    def _check_bytes(self, texts: Sequence[str], param: str) -> None:
        if self.max_tokens is None:
            return
        size, most = sum(len(text.encode()) for text in texts), self.max_tokens * self.tokenizer.longest_token_bytes
        if size > most:
            message = f"{param} has {size} bytes of text, more than the limit of {self.max_tokens} tokens "
            message += f"(--max-length-tokens) can hold ({most} bytes): shorten it, nothing is truncated here"
            raise refuse("too_long", message, param=param)

    def _check_tokens(self, tokens: int, param: str) -> None:
        if self.max_tokens is not None and tokens > self.max_tokens:
            message = f"{param} has {tokens} tokens; the limit is {self.max_tokens} (--max-length-tokens)"
            raise refuse("too_long", f"{message}: shorten it, nothing is truncated here", param=param)

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
    """The id that ends a response: the special token that the template puts right after it, else EOS."""
    if renderer == "chat":
        mark = "DenseRewardMark"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        after = tokenizer.render_chat(turns, generation_prompt=False).partition(mark)[2]
        ids = tokenizer.encode(after.lstrip(), special=True).ids
        if ids and ids[0] in tokenizer.special_ids:
            return ids[0]
    return tokenizer.eos_id


class _TurnStream:
    """One sequence of several turns: each scored response, and the unscored context before it."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._scored: list[bool] = []
        self._text = ""
        self._spans: list[Span] = []

    @property
    def length(self) -> int:
        return len(self._ids)

    def context(self, prompt: IdArray) -> None:
        """Continue with the ids that a policy would see next. Raises RequestError unless they extend the ids so far."""
        ids = prompt.tolist()
        seen = len(self._ids)
        if ids[:seen] != self._ids:
            raise refuse(
                "bad_template",
                "a policy would get different ids for the earlier turns than those that it answered, because the chat "
                "template or the tokenizer renders them differently once the conversation continues, so all_assistant "
                'would score states that no policy sees: send each turn with score "last", or send ids',
                param="score",
            )
        self._ids = ids
        self._scored.extend([False] * (len(ids) - seen))

    def response(self, encoded: EncodedResponse) -> None:
        shift = len(self._text)
        self._ids.extend(encoded.ids_T.tolist())
        self._scored.extend([True] * len(encoded.ids_T))
        self._text += encoded.text or ""
        self._spans.extend((start + shift, end + shift) for start, end in encoded.spans_S or ())

    def finish(self) -> Encoded:
        """The encoded conversation. All ids before the first response are the prompt."""
        ids, scored = np.array(self._ids, dtype=np.int32), np.array(self._scored, dtype=bool)
        first = int(scored.argmax()) if scored.any() else len(ids)
        response = EncodedResponse(ids[first:], scored[first:], self._text, tuple(self._spans))
        return Encoded(ids[:first], (response,))


def _from_zero(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans whose first one begins at 0: the first token of a text is not scored, and its text must not be a gap."""
    return ((0, spans[0][1]), *spans[1:]) if spans else ()


def _content(message: Message) -> str:
    """The text of a canonical message. Raises RequestError for several parts: a response's text has no joints."""
    content = message.get("content")
    if not isinstance(content, str) and not (isinstance(content, Sequence) and len(content) == 1):
        raise refuse("invalid_request", "message content must be a string or a single text part", param="messages")
    return text_of(message)


def _response_text(message: Message) -> str:
    """The text of a response to score. Raises RequestError if it has more than text."""
    others = sorted(message.keys() - {"role", "content"})
    if others:
        raise refuse(
            "invalid_request",
            f"a response is scored by its content, this one has {others[0]} too: put everything that the model "
            "generated into content, verbatim, or send ids",
            param="messages",
        )
    return _content(message)


def _single_user_turn(messages: Sequence[Message], renderer: str) -> str:
    if len(messages) != 1 or messages[0].get("role") != "user" or messages[0].keys() - {"role", "content"}:
        raise refuse(
            "bad_template",
            f"the {renderer} renderer takes one user message and one response, with only role and content: "
            "train with a chat template for other chats, or send ids",
            param="messages",
        )
    return _content(messages[0])
