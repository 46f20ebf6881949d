"""A checkpoint's chat template: how a chat becomes text, and what precedes and follows a response. Pure.

A template defines twice what precedes a response: in its generation prompt, which a policy continues, and in its own
rendering of a whole chat, which training programs learn from. If the two differ, only the user can say which is meant.
The manifest holds that decision (TemplateChoices).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue as PlainJson

from dense_reward.errors import refuse
from dense_reward.text.repetition import is_unclosed_thought
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.tokenizer import Pieces, Tokenizer

USERS = ("What is the capital of Norway?", "Name two rivers that flow into the Black Sea.")
MARK = "The answer stands in this sentence"
"""A response to render. Several words of letters: templates strip blanks, and tokenizers split digits."""
SAID = (MARK, "It is a city", "Yes", "4")
"""Responses to tokenise: a tokenizer joins some first words with what stands before them, and others not."""
MAX_CACHED = 256
"""Limit on the variables of requests whose results are kept."""
MAX_CACHED_KEY_CHARACTERS = 2_000
"""Longer variables, such as documents, would fill the memory: the result of each holds renderings."""


@dataclass(frozen=True, slots=True)
class TemplateChoices:
    """What a manifest decides about a chat template: see the fields of Manifest of the same names."""

    template_kwargs: Mapping[str, PlainJson] = field(default_factory=dict)
    response_prefix: str | None = None
    template_date: str | None = None


@dataclass(frozen=True, slots=True)
class ResponsePlace:
    """What precedes and follows a response, for one set of template variables.

    `agrees`: prompt, response and end of turn have the ids of the template's own rendering, and no thought is left open
    before the response; `starts_alike`: prompt and response have those ids, whatever comes after them. `continues`: the
    response is tokenised as the continuation of a text. `prompt` and `own`: a prompt with its response, as it is laid
    out here and as the template renders the whole turn. `before` and `own_before`: the same, from the user's text to
    the response. `opening`: what the prompt opens for the response, such as a thought. `closing`: what the template
    writes between a response and its end of turn, if the response starts where the template has it. `holds_special`:
    the template's own rendering has other special tokens there than the prompt, so a model writes special tokens in its
    responses.
    """

    agrees: bool
    starts_alike: bool
    continues: bool
    prompt: str
    own: str
    before: str
    own_before: str
    opening: str
    closing: str
    holds_special: bool


class ChatTemplate:
    """A tokenizer's chat template with the choices of a manifest. Keeps what depends on the template alone."""

    def __init__(self, tokenizer: Tokenizer, choices: TemplateChoices, end_of_turn_id: int | None) -> None:
        self.tokenizer = tokenizer
        self.choices = choices
        self.end_of_turn_id = end_of_turn_id
        self._places: dict[str, ResponsePlace] = {}

    @property
    def special_ids(self) -> frozenset[int]:
        return self.tokenizer.special_ids

    @property
    def special_strings(self) -> tuple[str, ...]:
        return self.tokenizer.special_strings

    @property
    def end_string(self) -> str:
        """The end of turn as text; empty if there is none."""
        return "" if self.end_of_turn_id is None else self.tokenizer.pieces([self.end_of_turn_id])[0]

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        return self.tokenizer.encode(text, special=special, continues=continues, at_most=at_most)

    def closed(self, said: str, closing: str, *, continues: bool) -> Pieces:
        """A response with what the template writes after it; that has empty spans at the end of the response."""
        at = min((i for i in map(closing.find, self.special_strings) if i >= 0), default=len(closing))
        first = self.encode(said + closing[:at], special=False, continues=continues)
        rest = self.encode(closing[at:], special=True)
        length = len(said)
        spans = [(min(start, length), min(end, length)) for start, end in first.offsets]
        return Pieces((*first.ids, *rest.ids), (*spans, *((length, length) for _ in rest.ids)))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str:
        """The template's text with the manifest's variables and date; after a generation prompt the response prefix.

        Raises RequestError(bad_template) if the template fails.
        """
        rendered = self.tokenizer.render_chat(
            messages,
            generation_prompt=generation_prompt,
            tools=tools,
            template_kwargs=self._variables(template_kwargs),
            date=self.choices.template_date,
        )
        return rendered + (self.choices.response_prefix or "") if generation_prompt else rendered

    def place(self, template_kwargs: Mapping[str, JsonValue] | None = None) -> ResponsePlace:
        """What precedes and follows a response. Raises RequestError(bad_template) if the template drops a message."""
        key = json.dumps(self._variables(template_kwargs), sort_keys=True, default=str)
        found = self._places.get(key)
        if found is None:
            found = self._place(template_kwargs)
            if len(self._places) >= MAX_CACHED:
                self._places.clear()
            if len(key) <= MAX_CACHED_KEY_CHARACTERS:
                self._places[key] = found
        return found

    def is_decided(self, template_kwargs: Mapping[str, JsonValue] | None = None) -> bool:
        """Whether it is known what precedes a response: both renderings agree, or the manifest decides."""
        place = self.place(template_kwargs)
        if place.agrees or not template_kwargs:
            return place.agrees or self.choices.response_prefix is not None
        decided = self.place()
        same = (place.before, place.own_before) == (decided.before, decided.own_before)
        return self.choices.response_prefix is not None and same

    def own_end(self) -> tuple[int | None, tuple[int, ...]]:
        """The special token that the template puts right after a response (None: there is none), and all ids after it.

        Raises RequestError(bad_template) if the template drops a message.
        """
        own = self._own(USERS[0], {})
        ids = self.tokenizer.encode(own.rpartition(MARK)[2].lstrip(), special=True).ids
        return (ids[0] if ids and ids[0] in self.tokenizer.special_ids else None), ids

    def _variables(self, template_kwargs: Mapping[str, JsonValue] | None) -> dict[str, JsonValue]:
        return {**self.choices.template_kwargs, **(template_kwargs or {})}

    def _check_words(self, rendered: str, user: str) -> None:
        """Raises RequestError(bad_template) unless the words of the user and then of the assistant are rendered."""
        if user not in rendered or MARK not in rendered.rpartition(user)[2]:
            raise refuse(
                "bad_template",
                "the chat template drops or changes the words of the user or the assistant, so different texts would "
                "get equal rewards: give the tokenizer the template that the model was trained with",
                param="messages",
            )

    def _prompt(self, user: str, template_kwargs: Mapping[str, JsonValue]) -> str:
        chat: list[Message] = [{"role": "user", "content": user}]
        return self.render_chat(chat, generation_prompt=True, template_kwargs=template_kwargs)

    def _own(self, user: str, template_kwargs: Mapping[str, JsonValue]) -> str:
        """The template's own rendering of a whole turn with MARK as the response."""
        chat: list[Message] = [{"role": "user", "content": user}, {"role": "assistant", "content": MARK}]
        rendered = self.render_chat(chat, generation_prompt=False, template_kwargs=template_kwargs)
        self._check_words(rendered, user)
        return rendered

    def _place(self, template_kwargs: Mapping[str, JsonValue] | None) -> ResponsePlace:
        variables = template_kwargs or {}
        prompts = [self._prompt(user, variables) for user in USERS]
        owns = [self._own(user, variables) for user in USERS]
        end = self.end_string
        own_turn, _, own_after = owns[0].rpartition(MARK)
        closing = own_after.partition(end)[0] if end and end in own_after else ""
        rules = [
            [self._agreement(prompt, own, closing, continues) for prompt, own in zip(prompts, owns, strict=True)]
            for continues in (False, True)
        ]
        # The first rule under which the prompt and the response have the ids of the template's rendering, else the
        # rule under which the ids decode to the text of prompt and response.
        continues = not all(start for start, _ in rules[0])
        starts_alike = all(start for start, _ in rules[continues])
        before = prompts[0].rpartition(USERS[0])[2]
        opening = before.rpartition(end)[2] if end else before
        return ResponsePlace(
            agrees=all(whole for _, whole in rules[continues]) and not is_unclosed_thought(MARK, opening),
            starts_alike=starts_alike,
            continues=continues,
            prompt=prompts[0] + MARK + end,
            own=own_turn + MARK + (own_after.partition(end)[0] + end if end and end in own_after else ""),
            before=before,
            own_before=own_turn.rpartition(USERS[0])[2] + MARK + own_after,
            opening=opening,
            closing=closing if starts_alike and self.choices.response_prefix != "" else "",
            holds_special=self._special_in(before) != self._special_in(own_turn.rpartition(USERS[0])[2]),
        )

    def _special_in(self, text: str) -> list[int]:
        return [i for i in self.tokenizer.encode(text, special=True).ids if i in self.tokenizer.special_ids]

    def _agreement(self, prompt: str, own: str, closing: str, continues: bool) -> tuple[bool, bool]:
        """Whether the ids are those of the template's own rendering: up to the response, and with its end of turn."""
        turn, _, after = own.rpartition(MARK)
        found = [self._agreement_of(prompt, (turn, said, after), closing, continues) for said in SAID]
        return all(start for start, _ in found), all(whole for _, whole in found)

    def _agreement_of(self, prompt: str, own: tuple[str, str, str], closing: str, continues: bool) -> tuple[bool, bool]:
        encode = self.tokenizer.encode
        turn, said, after = own
        before_ids = encode(prompt, special=True).ids
        start_ids = [*before_ids, *encode(said, special=False, continues=continues).ids]
        pieces = encode(turn + said + after, special=True)
        later = [at for at, (start, _) in enumerate(pieces.offsets) if start >= len(turn) + len(said)]
        end = next((at for at in later if pieces.ids[at] == self.end_of_turn_id), None)
        if end is None:  # the template writes no end of turn
            alike = list(encode(turn + said, special=True).ids) == start_ids
            return alike, alike
        whole_ids = [*before_ids, *self.closed(said, closing, continues=continues).ids]
        return list(pieces.ids[: len(start_ids)]) == start_ids, list(pieces.ids[:end]) == whole_ids
