"""Text -> ids, by one rule for training and scoring. Pure; takes a tokenizer through a Protocol.

ids = tokenise(rendered prompt) + tokenise(response) + end of turn. The parts are tokenised separately, never as one
text, because a policy generates its response after the ids of the prompt. Text that a template puts after the end of
turn is not scored. Special-token strings inside text that is rendered here are plain text; in raw text they are the
special tokens. A tokenizer that puts a space before a text (SentencePiece's dummy prefix) puts none before a response,
unless the template's own rendering has it there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dense_reward.cancellation import check_cancelled
from dense_reward.errors import refuse
from dense_reward.records import IdArray
from dense_reward.text.encoded import Encoded, EncodedResponse, TurnStream
from dense_reward.text.marks import MarkedChat, refuse_lost
from dense_reward.text.messages import canonical, text_of
from dense_reward.text.offsets import Span, monotone_spans
from dense_reward.text.opening import checked_opening
from dense_reward.text.rendering import EscapedChat
from dense_reward.text.repetition import ends_among, is_unclosed_thought, refuse_repetition, repetition_of
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.template import MARK, ChatTemplate, ResponsePlace, TemplateChoices
from dense_reward.text.tokenizer import Pieces, RendererName, Tokenizer
from dense_reward.text.turns import elsewhere, is_joined, thought_and_answer, written_turn
from dense_reward.text.undecided import TOKENISED_AS_ONE, Style, explanation, stands_elsewhere

PLAIN_FORMATS: Mapping[str, str] = {
    "plain": "{prompt}\n",
    # The template of SPIN (arXiv 2401.01335, appendix B).
    "instruction": "### Instruction: {prompt}\n\n### Response: ",
}
THOUGHT_KEYS = ("reasoning_content", "thinking")
"""Keys of a message under which templates and servers keep what the model thought before its answer."""
Variables = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with the renderer that its model was trained with, and the manifest's choices for a chat template.

    If `max_tokens` is set, anything longer is refused as too_long. A text with more bytes than `max_tokens` of the
    longest tokens can hold is refused before it is tokenised, even if the tokenizer would skip most of it.
    """

    tokenizer: Tokenizer
    renderer: RendererName
    end_of_turn_id: int | None
    max_tokens: int | None = None
    choices: TemplateChoices = field(default_factory=TemplateChoices)
    # Derived from the other fields, and passed on by `replace`: it keeps what it has found out about the template.
    template: ChatTemplate | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = self.template
        if known is None or (known.choices, known.end_of_turn_id) != (self.choices, self.end_of_turn_id):
            template = ChatTemplate(self.tokenizer, self.choices, self.end_of_turn_id)
            object.__setattr__(self, "template", template)

    @classmethod
    def of(cls, tokenizer: Tokenizer, renderer: RendererName, choices: TemplateChoices | None = None) -> "Encoder":
        """Raises RequestError(bad_template) if the chat template drops words of the user or the assistant."""
        chosen = choices or TemplateChoices()
        return cls(tokenizer, renderer, end_of_turn_id(tokenizer, renderer, chosen), choices=chosen)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template with the choices of the manifest."""
        if self.template is None:
            raise AssertionError("__post_init__ sets it")
        return self.template

    def undecided(self, style: Style) -> str | None:
        """Why texts and chats are refused, with the choices, in several lines; None if they are served.

        Raises RequestError(bad_template) if the chat template drops words of the user or the assistant.
        """
        return None if self.renderer != "chat" or self.chat.is_decided() else explanation(self.chat, style)

    def prompt(self, prompt: str, *, raw: bool = False) -> IdArray:
        """Ids of a prompt. It is rendered as one user turn; `raw`: it is rendered already."""
        if raw:
            return self._with_bos(self._encode(prompt, "prompt", special=True).ids)
        if not prompt and self.tokenizer.bos_id is None:
            message = "prompt is empty and the tokenizer has no BOS: give at least one token"
            raise refuse("empty_prompt", message, param="prompt")
        if self.renderer == "chat":
            return self._chat([{"role": "user", "content": prompt}], None, None, "prompt")
        before, after = PLAIN_FORMATS[self.renderer].split("{prompt}")
        return self._with_bos(self._encode(before + prompt + after, "prompt", special=False).ids)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Variables | None = None,
    ) -> IdArray:
        """Ids of a chat up to the point where the assistant answers. Raises RequestError if a message would be lost."""
        return self._opened(canonical(messages), tools, template_kwargs)[0]

    def _opened(
        self, messages: Sequence[Message], tools: Sequence[JsonValue] | None, template_kwargs: Variables | None
    ) -> tuple[IdArray, str]:
        """Ids of the prompt of canonical messages, and what that prompt opens for the response."""
        if self.renderer == "chat":
            ids = self._chat(messages, tools, template_kwargs, "messages")
            marked = refuse_lost(self.chat, messages, tools, template_kwargs)
            self._refuse_elsewhere(marked, self.chat.place(template_kwargs))
            return ids, checked_opening(self.chat, marked, template_kwargs)
        if tools or template_kwargs:
            message = f"the {self.renderer} renderer has no place for tools and template_kwargs: omit them"
            raise refuse("bad_template", message, param="tools" if tools else "template_kwargs")
        return self.prompt(_single_user_turn(messages, self.renderer)), ""

    def _refuse_elsewhere(self, marked: MarkedChat, place: ResponsePlace) -> None:
        """Raises RequestError(undecided_template) if a response stands elsewhere in this chat than in a plain one."""
        if place.starts_alike and self.choices.response_prefix != "" and len(marked.chat.messages) > 1:
            found = elsewhere(marked.chat, marked.rendered, marked.last_mark, place.continues)
            if found is not None:
                raise refuse("undecided_template", stands_elsewhere(*found), param="messages")

    def _chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Variables | None,
        param: str,
    ) -> IdArray:
        self._place(template_kwargs, param)
        chat = EscapedChat.of(self.chat, messages, tools, template_kwargs)
        parts = chat.escaper.split(chat.render(generation_prompt=True))
        return np.array(self._encode_parts(parts, param, continues=False).ids, dtype=np.int32)

    def _place(self, template_kwargs: Variables | None, param: str) -> ResponsePlace:
        """What precedes and follows a response. Raises RequestError(undecided_template) if that is not known."""
        if not self.chat.is_decided(template_kwargs):
            raise refuse("undecided_template", explanation(self.chat, "flags", template_kwargs), param=param)
        return self.chat.place(template_kwargs)

    def response(
        self,
        text: str,
        *,
        add_eos: bool,
        raw: bool = False,
        raw_prompt: str = "",
        template_kwargs: Variables | None = None,
        opening: str | None = None,
    ) -> EncodedResponse:
        """Ids of a response. `add_eos` appends the end of turn, with an empty span at the end of the text.

        `raw_prompt`: the text before a raw response. `opening`: what its prompt opens, None: that of a plain chat.
        Raises RequestError(repeated_text) if the response repeats what its prompt has opened, or an end of turn.
        """
        parsed = raw or self._writes_special_tokens(template_kwargs)
        continues = self._continues(raw_prompt, raw, template_kwargs)
        pieces = self._encode(text, "response", special=parsed, continues=continues)
        closing = "" if parsed or not add_eos or self.renderer != "chat" else self.chat.place(template_kwargs).closing
        if closing:
            pieces = self.chat.closed(text, closing, continues=continues)
        if opening is None:
            opening = "" if raw else self._plain_opening(template_kwargs)
        ends = self._ends(parsed=parsed, closing=closing) if add_eos or not parsed else ()
        refuse_repetition(repetition_of(text, opening, ends), add_eos=add_eos)
        return self._response_of(text, pieces, add_eos=add_eos)

    def without_repetition(self, text: str) -> str:
        """A response without what it repeats of its prompt, and without an end of turn at its end.

        Raises RequestError(repeated_text) if it cannot be said what is repeated.
        """
        closing = self.chat.place().closing if self.renderer == "chat" else ""
        ends = self._ends(parsed=self._writes_special_tokens(None), closing=closing)
        found = repetition_of(text, self._plain_opening(None), ends)
        if found is None:
            return text
        if found.contradicts:
            refuse_repetition(found)
        return text[found.start : found.end]

    def leaves_thought_open(self, text: str) -> bool:
        """Whether the prompt of this response opens a thought that the response does not close."""
        return self.renderer == "chat" and is_unclosed_thought(text, self.chat.place().opening)

    def _response_of(self, text: str, pieces: Pieces, *, add_eos: bool) -> EncodedResponse:
        spans = monotone_spans(pieces.offsets, len(text))
        ids = list(pieces.ids)
        if add_eos:
            ids.append(self._end_of_turn())
            spans = (*spans, (len(text), len(text)))
        return EncodedResponse(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), text, spans)

    def _continues(self, raw_prompt: str, raw: bool, template_kwargs: Variables | None) -> bool:
        """Whether a response gets no dummy prefix."""
        if not self.tokenizer.has_dummy_prefix:
            return False
        if raw:
            encode = self.tokenizer.encode
            apart = encode(raw_prompt, special=True).ids + encode(MARK, special=False).ids
            return bool(raw_prompt) and encode(raw_prompt + MARK, special=True).ids != apart
        return True if self.renderer != "chat" else self.chat.place(template_kwargs).continues

    def _plain_opening(self, template_kwargs: Variables | None) -> str:
        """What the prompt of a plain chat opens for its response."""
        return self.chat.place(template_kwargs).opening if self.renderer == "chat" else ""

    def _ends(self, *, parsed: bool, closing: str = "") -> tuple[str, ...]:
        """Strings that a response must not end in: its end of turn, and what the template writes before that.

        Unless special tokens in the response are parsed, any other end too.
        """
        own = "" if self.end_of_turn_id is None else self.tokenizer.pieces([self.end_of_turn_id])[0]
        others = () if parsed else ends_among(self.tokenizer.special_strings)
        return tuple(dict.fromkeys(end for end in (own, closing.strip(), *others) if end))

    def _writes_special_tokens(self, template_kwargs: Variables | None) -> bool:
        """Whether a response holds the template's special tokens: it is decided that it holds all that a model writes,
        and the template puts special tokens, such as those of a channel, between its header and its text."""
        decided = self.renderer == "chat" and self.chat.choices.response_prefix == ""
        return decided and self.chat.place(template_kwargs).holds_special

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        add_eos: bool,
        every_turn: bool = False,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Variables | None = None,
    ) -> Encoded:
        """A chat that ends with the assistant. Its last response is scored; with `every_turn`, all of them.

        Each response is scored after the ids that a policy would see, or refused: see TurnStream.context.
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
        longest = self._opened(messages[: scored[-1]], tools, template_kwargs)
        stream = TurnStream()
        for turn in scored:
            check_cancelled()
            prompt_P, opening = longest if turn == scored[-1] else self._opened(messages[:turn], tools, template_kwargs)
            stream.context(prompt_P)
            stream.response(self._turn(messages[: turn + 1], tools, template_kwargs, opening, add_eos=add_eos))
            self._check_tokens(stream.length, "messages")
        return stream.finish()

    def _turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Variables | None,
        opening: str,
        *,
        add_eos: bool,
    ) -> EncodedResponse:
        """The last message as a policy writes it: its text, or the template's rendering of thoughts and tool calls."""
        thinks = any(messages[-1].get(key) for key in THOUGHT_KEYS)
        if not thinks and "tool_calls" not in messages[-1]:
            text = _response_text(messages[-1])
            return self.response(text, add_eos=add_eos, template_kwargs=template_kwargs, opening=opening)
        if self.renderer != "chat":
            what = "tool_calls" if "tool_calls" in messages[-1] else "thoughts"
            message = f"the {self.renderer} renderer has no place for {what}: send what the policy wrote as content"
            raise refuse("bad_template", message, param="messages")
        chat = EscapedChat.of(self.chat, messages, tools, template_kwargs)
        continues = self._continues("", False, template_kwargs)
        if "tool_calls" not in messages[-1]:
            found = repetition_of(_content(messages[-1]), opening, self._ends(parsed=False))
            refuse_repetition(found, add_eos=add_eos)
            parts = thought_and_answer(chat, self.chat.end_string)
            pieces = self._encode_parts(parts, "messages", continues=continues)
            self._refuse_joined(chat, pieces.ids, continues)
            return self._response_of("".join(part for part, _ in parts), pieces, add_eos=add_eos)
        turn = written_turn(chat, with_end=add_eos, continues=continues, at_most=self.max_tokens)
        self._refuse_joined(chat, turn.ids[:-1] if add_eos else turn.ids, continues)
        return EncodedResponse(
            np.array(turn.ids, dtype=np.int32), np.ones(len(turn.ids), dtype=bool), turn.text, turn.spans
        )

    def _refuse_joined(self, chat: EscapedChat, turn_ids: Sequence[int], continues: bool) -> None:
        """Raises RequestError(undecided_template) unless a policy's turn has the ids of the template's rendering."""
        if self.choices.response_prefix != "" and is_joined(chat, turn_ids, continues):
            raise refuse("undecided_template", TOKENISED_AS_ONE, param="messages")

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

    def _encode(self, text: str, param: str, *, special: bool, continues: bool = False) -> Pieces:
        """Raises RequestError(too_long)."""
        return self._encode_parts([(text, special)], param, continues=continues)

    def _encode_parts(self, parts: Sequence[tuple[str, bool]], param: str, *, continues: bool) -> Pieces:
        """Parts of one text, each tokenised separately. Raises RequestError(too_long)."""
        self._check_bytes([text for text, _ in parts], param)
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for text, special in parts:
            after_text = bool(ids) and ids[-1] not in self.tokenizer.special_ids
            joined = after_text or (continues and not ids)
            pieces = self.tokenizer.encode(text, special=special, continues=joined, at_most=self.max_tokens)
            ids.extend(pieces.ids)
            offsets.extend((at + start, at + end) for start, end in pieces.offsets)
            at += len(text)
        self._check_tokens(len(ids), param)
        return Pieces(tuple(ids), tuple(offsets))

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
            message = "the tokenizer has no end-of-sequence token: send add_eos false"
            raise refuse("bad_template", message, param="add_eos")
        return self.end_of_turn_id

    def _with_bos(self, ids: Sequence[int]) -> IdArray:
        bos = self.tokenizer.bos_id
        if bos is not None and (not ids or ids[0] != bos):
            ids = (bos, *ids)
        return np.array(ids, dtype=np.int32)


def end_of_turn_id(tokenizer: Tokenizer, renderer: RendererName, choices: TemplateChoices | None = None) -> int | None:
    """The id that ends a response: the special token that the template puts right after it, else EOS."""
    if renderer == "chat":
        own_end, _ = ChatTemplate(tokenizer, choices or TemplateChoices(), None).own_end()
        if own_end is not None:
            return own_end
    return tokenizer.eos_id


def _from_zero(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans whose first one begins at 0: the first token of a text is not scored, and its text must not be a gap."""
    return ((0, spans[0][1]), *spans[1:]) if spans else ()


def _content(message: Message) -> str:
    """The text of a canonical message. Raises RequestError for several parts: a response's text has no joints."""
    content = message.get("content")
    if not isinstance(content, str) and not (isinstance(content, Sequence) and len(content) == 1):
        raise refuse("invalid_request", "message content must be a string or a single text part", param="messages")
    return text_of(message)


def _response_text(said: Message) -> str:
    """The text of a response to score. Raises RequestError if it has more than text."""
    others = sorted(said.keys() - {"role", "content"})
    if others:
        message = f"a response is scored by its content, this one has {others[0]} too: put everything that the model "
        message += "generated into content, verbatim, or send ids"
        raise refuse("invalid_request", message, param="messages")
    return _content(said)


def _single_user_turn(messages: Sequence[Message], renderer: str) -> str:
    if len(messages) != 1 or messages[0].get("role") != "user" or messages[0].keys() - {"role", "content"}:
        raise refuse(
            "bad_template",
            f"the {renderer} renderer takes one user message and one response, with only role and content: "
            "train with a chat template for other chats, or send ids",
            param="messages",
        )
    return _content(messages[0])
