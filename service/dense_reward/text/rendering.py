"""A chat with its tools and variables, escaped once and rendered as often as needed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dense_reward.text.special_tokens import JsonValue, Message, SpecialTokenEscaper
from dense_reward.text.tokenizer import Pieces


class RendersChats(Protocol):
    """A tokenizer, or one with the choices of a manifest: see ChatTemplate."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def special_strings(self) -> tuple[str, ...]: ...
    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces: ...
    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class EscapedChat:
    """Messages, tools and variables of a template in which the special-token strings are escaped."""

    tokenizer: RendersChats
    escaper: SpecialTokenEscaper
    messages: tuple[Message, ...]
    tools: tuple[JsonValue, ...] | None
    template_kwargs: Mapping[str, JsonValue]

    @classmethod
    def of(
        cls,
        tokenizer: RendersChats,
        messages: Sequence[Message],
        tools: Sequence[JsonValue] | None,
        template_kwargs: Mapping[str, JsonValue] | None,
    ) -> "EscapedChat":
        escaper = SpecialTokenEscaper(tokenizer.special_strings, (messages, tools, template_kwargs))
        return cls(
            tokenizer,
            escaper,
            tuple(_escaped(message, escaper) for message in messages),
            None if tools is None else tuple(escaper.escape(tool) for tool in tools),
            {name: escaper.escape(value) for name, value in (template_kwargs or {}).items()},
        )

    def render(self, *, generation_prompt: bool, messages: Sequence[Message] | None = None) -> str:
        """The template's text of the messages, or of others that are escaped like these."""
        return self.tokenizer.render_chat(
            self.messages if messages is None else messages,
            generation_prompt=generation_prompt,
            tools=self.tools,
            template_kwargs=self.template_kwargs,
        )


def _escaped(message: Message, escaper: SpecialTokenEscaper) -> Message:
    """The message for a template. A role that is a word is not escaped, because templates compare it."""
    kept = {"role"} if str(message.get("role")).isidentifier() else set()
    return {key: value if key in kept else escaper.escape(value) for key, value in message.items()}
