"""What encoding needs from a tokenizer, as a Protocol. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dense_reward.text.offsets import Span
from dense_reward.text.special_tokens import JsonValue, Message

RendererName = Literal["chat", "plain", "instruction"]


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

    @property
    def has_dummy_prefix(self) -> bool:
        """Whether the tokenizer itself puts a space before a text, as SentencePiece does."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads, without messages, tools and special tokens."""
        ...

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        """Ids without BOS or any other that the tokenizer adds. `special`: special-token strings become their ids.

        `continues`: the text continues another one, so the tokenizer puts no space before it. A tokenizer can raise
        RequestError(too_long) if there are more than `at_most`.
        """
        ...

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        date: str | None = None,
    ) -> str:
        """The text of the chat template. `date` (YYYY-MM-DD): the day that a template gets if it asks for it.

        Raises RequestError(bad_template) if the template fails.
        """
        ...

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        """Decoded text and the span of each id: see offsets.decoded_spans."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """The text of all ids, decoded together."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, decoded separately."""
        ...
