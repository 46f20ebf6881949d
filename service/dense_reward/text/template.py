"""A checkpoint's chat template: how a chat becomes text, and what stands before and after a response. Pure.

A template says twice what a response stands after: in its generation prompt, which a policy continues, and in its own
rendering of a whole chat, which training programs learn from. Where the two differ, only the user can say which is
meant; the manifest holds that decision (TemplateChoices).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue as PlainJson

from dense_reward.errors import RequestError, refuse
from dense_reward.text.special_tokens import JsonValue, Message, SpecialTokenEscaper
from dense_reward.text.tokenizer import Tokenizer

USERS = ("What is the capital of Norway?", "Name two rivers that flow into the Black Sea.")
MARK = "The answer stands in this sentence"
"""A response to render. Several words of letters: templates strip blanks, and tokenizers split digits."""
MAX_CACHED = 64
"""Limit on the variables and roles of requests whose results are kept."""


@dataclass(frozen=True, slots=True)
class TemplateChoices:
    """What a manifest decides about a chat template: see the fields of Manifest of the same names."""

    template_kwargs: Mapping[str, PlainJson] = field(default_factory=dict)
    response_prefix: str | None = None
    template_date: str | None = None


@dataclass(frozen=True, slots=True)
class ResponsePlace:
    """What stands around a response, for one set of template variables.

    `agrees`: prompt, response and end of turn have the ids of the template's own rendering; `starts_alike`: prompt and
    response have, whatever comes after them. `continues`: the response
    is tokenised as the continuation of a text. `prompt` and `own`: a prompt with its response, as it is laid out here
    and as the template renders the whole turn. `before` and `own_before`: the same, from the user's text to the
    response. `opening`: what the prompt opens for the response, such as a thought.
    """

    agrees: bool
    starts_alike: bool
    continues: bool
    prompt: str
    own: str
    before: str
    own_before: str
    opening: str


class ChatTemplate:
    """A tokenizer's chat template with the choices of a manifest. Keeps what depends on the template alone."""

    def __init__(self, tokenizer: Tokenizer, choices: TemplateChoices, end_of_turn_id: int | None) -> None:
        self.tokenizer = tokenizer
        self.choices = choices
        self.end_of_turn_id = end_of_turn_id
        self._as_parts: bool | None = None
        self._places: dict[str, ResponsePlace] = {}
        self._roles: dict[str, bool] = {}

    def prompt_parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> list[tuple[str, bool]]:
        """The text before the assistant's answer, in parts: see SpecialTokenEscaper.split."""
        escaper = self._escaper(messages, tools, template_kwargs)
        return escaper.split(self._rendered(messages, tools, template_kwargs, escaper, generation_prompt=True))

    def response_parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> list[tuple[str, bool]]:
        """What a policy writes as the last message: the template's own rendering of it, without the end of turn.

        Raises RequestError(bad_template) if that does not continue the prompt of the other messages.
        """
        escaper = self._escaper(messages, tools, template_kwargs)
        before = self._rendered(messages[:-1], tools, template_kwargs, escaper, generation_prompt=True)
        whole = self._rendered(messages, tools, template_kwargs, escaper, generation_prompt=False)
        end = self._end_string()
        if not whole.startswith(before) or not end or end not in whole[len(before) :]:
            raise refuse(
                "bad_template",
                "the chat template does not render this response after its generation prompt, so what a policy writes "
                "is not known: put everything that the model generated into content, verbatim, or send ids",
                param="messages",
            )
        return escaper.split(whole[len(before) :].partition(end)[0])

    def place(self, template_kwargs: Mapping[str, JsonValue] | None = None) -> ResponsePlace:
        """What stands around a response. Raises RequestError(bad_template) if the template drops a message."""
        key = json.dumps(self._variables(template_kwargs), sort_keys=True, default=str)
        found = self._places.get(key)
        if found is None:
            if len(self._places) >= MAX_CACHED:
                self._places.clear()
            found = self._places[key] = self._place(template_kwargs)
        return found

    def is_decided(self, template_kwargs: Mapping[str, JsonValue] | None = None) -> bool:
        """Whether it is known what a response stands after: both renderings agree, or the manifest decides."""
        place = self.place(template_kwargs)
        if place.agrees or not template_kwargs:
            return place.agrees or self.choices.response_prefix is not None
        decided = self.place()
        same = (place.before, place.own_before) == (decided.before, decided.own_before)
        return self.choices.response_prefix is not None and same

    def check_roles(self, messages: Sequence[Message]) -> None:
        """Raises RequestError(bad_template) if the template renders nothing of a message, because of its role."""
        for role in {str(message.get("role")) for message in messages} - {"user", "assistant"}:
            if role not in self._roles:
                if len(self._roles) >= MAX_CACHED:
                    self._roles.clear()
                self._roles[role] = self._renders_role(role)
            if not self._roles[role]:
                message = f"the chat template drops messages of the role {role[:40]!r}: put their text into the user's"
                raise refuse("bad_template", message, param="messages")

    def own_end(self) -> tuple[int | None, tuple[int, ...]]:
        """The special token that the template puts right after a response (None: there is none), and all ids after it.

        Raises RequestError(bad_template) if the template drops a message.
        """
        own = self._turn(USERS[0], {}, generation_prompt=False)
        ids = self.tokenizer.encode(own.rpartition(MARK)[2].lstrip(), special=True).ids
        return (ids[0] if ids and ids[0] in self.tokenizer.special_ids else None), ids

    def _variables(self, template_kwargs: Mapping[str, JsonValue] | None) -> dict[str, JsonValue]:
        return {**self.choices.template_kwargs, **(template_kwargs or {})}

    def _escaper(self, *user_text: object) -> SpecialTokenEscaper:
        return SpecialTokenEscaper(self.tokenizer.special_strings, user_text)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue] | None,
        escaper: SpecialTokenEscaper,
        *,
        generation_prompt: bool,
    ) -> str:
        return self._render(
            [_escaped(message, escaper) for message in messages],
            None if tools is None else [escaper.escape(tool) for tool in tools],
            {name: escaper.escape(value) for name, value in (template_kwargs or {}).items()},
            generation_prompt=generation_prompt,
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue],
        *,
        generation_prompt: bool,
        as_parts: bool | None = None,
    ) -> str:
        """The template's text; after a generation prompt the response prefix of the manifest."""
        in_parts = self.takes_parts() if as_parts is None else as_parts
        rendered = self.tokenizer.render_chat(
            [_with_parts(message) for message in messages] if in_parts else messages,
            generation_prompt=generation_prompt,
            tools=tools,
            template_kwargs=self._variables(template_kwargs),
            date=self.choices.template_date,
        )
        return rendered + (self.choices.response_prefix or "") if generation_prompt else rendered

    def takes_parts(self) -> bool:
        """Whether the template takes content as a list of parts, as templates for pictures do, and drops strings.

        Raises RequestError(bad_template) if it renders neither form.
        """
        if self._as_parts is None:
            self._as_parts = self._content_form()
        return self._as_parts

    def _content_form(self) -> bool:
        failed: RequestError | None = None
        chat: list[Message] = [{"role": "user", "content": USERS[0]}, {"role": "assistant", "content": MARK}]
        for as_parts in (False, True):
            try:
                rendered = self._render(chat, None, {}, generation_prompt=False, as_parts=as_parts)
            except RequestError as error:
                failed = failed or error
                continue
            if USERS[0] in rendered and MARK in rendered.rpartition(USERS[0])[2]:
                return as_parts
        raise failed or refuse(
            "bad_template",
            "the chat template drops or changes the words of the user or the assistant, so different texts would get "
            "equal rewards: give the tokenizer the template that the model was trained with, or adopt the checkpoint "
            "with --renderer plain",
            param="messages",
        )

    def _turn(self, user: str, template_kwargs: Mapping[str, JsonValue], *, generation_prompt: bool) -> str:
        chat: list[Message] = [{"role": "user", "content": user}]
        if not generation_prompt:
            chat.append({"role": "assistant", "content": MARK})
        return self._render(chat, None, template_kwargs, generation_prompt=generation_prompt)

    def _renders_role(self, role: str) -> bool:
        mark: Message = {"role": role, "content": MARK}
        user: Message = {"role": "user", "content": USERS[0]}
        is_first = role in {"system", "developer"}
        chat = [mark, user] if is_first else [user, {"role": "assistant", "content": USERS[1]}, mark]
        try:
            return MARK in self._render(chat, None, {}, generation_prompt=True)
        except RequestError:
            return True  # the template says itself what it does not take

    def _end_string(self) -> str:
        return "" if self.end_of_turn_id is None else self.tokenizer.pieces([self.end_of_turn_id])[0]

    def _place(self, template_kwargs: Mapping[str, JsonValue] | None) -> ResponsePlace:
        variables = template_kwargs or {}
        prompts = [self._turn(user, variables, generation_prompt=True) for user in USERS]
        owns = [self._turn(user, variables, generation_prompt=False) for user in USERS]
        rules = [
            [self._agreement(prompt, own, continues) for prompt, own in zip(prompts, owns, strict=True)]
            for continues in (False, True)
        ]
        # The first rule under which the prompt and the response have the ids of the template's rendering, else the
        # rule under which the ids decode to the text of prompt and response.
        continues = not all(start for start, _ in rules[0])
        end = self._end_string()
        own_turn, _, own_after = owns[0].rpartition(MARK)
        before = prompts[0].rpartition(USERS[0])[2]
        return ResponsePlace(
            agrees=all(whole for _, whole in rules[continues]),
            starts_alike=all(start for start, _ in rules[continues]),
            continues=continues,
            prompt=prompts[0] + MARK + end,
            own=own_turn + MARK + (own_after.partition(end)[0] + end if end and end in own_after else ""),
            before=before,
            own_before=own_turn.rpartition(USERS[0])[2] + MARK + own_after,
            opening=before.rpartition(end)[2] if end else before,
        )

    def _agreement(self, prompt: str, own: str, continues: bool) -> tuple[bool, bool]:
        """Whether the ids are those of the template's own rendering: up to the response, and with its end of turn."""
        encode = self.tokenizer.encode
        ids = [*encode(prompt, special=True).ids, *encode(MARK, special=False, continues=continues).ids]
        pieces, marked = encode(own, special=True), own.rindex(MARK) + len(MARK)
        after = [i for i, (start, _) in enumerate(pieces.offsets) if start >= marked]
        end = next((i for i in after if pieces.ids[i] == self.end_of_turn_id), None)
        if end is None:  # the template writes no end of turn
            own_ids = list(encode(own[:marked], special=True).ids)
            return own_ids == ids, own_ids == ids
        return list(pieces.ids[: len(ids)]) == ids, list(pieces.ids[:end]) == ids


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _escaped(message: Message, escaper: SpecialTokenEscaper) -> Message:
    """The message for a template. A role that is a word is not escaped, because templates compare it."""
    kept = {"role"} if str(message.get("role")).isidentifier() else set()
    return {key: value if key in kept else escaper.escape(value) for key, value in message.items()}
