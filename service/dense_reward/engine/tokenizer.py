"""The transformers tokenizer behind encode's Protocol. The only place that reads special tokens and chat templates."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dense_reward.encode import Pieces, RendererName, Span
from dense_reward.errors import CheckpointError, refuse
from dense_reward.guard import JsonValue, Message
from dense_reward.manifest import TOKENIZER_PROBE_TEXT, sha256_of_text, tokenizer_sha256


class TransformersTokenizer:
    """Two copies of one backend: `_parsing` turns special-token strings into their ids, `_literal` keeps them text.

    Two, because the switch between them is state of the backend and would leak between threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(
                f"{type(tokenizer).__name__} has no fast backend, so token spans cannot be had: "
                "convert it with transformers (it writes tokenizer.json) and adopt the checkpoint again"
            )
        self._tokenizer = tokenizer
        self._parsing: Backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._literal: Backend = copy.deepcopy(self._parsing)
        self._parsing.encode_special_tokens = False
        self._literal.encode_special_tokens = True
        self._bos_id = _bos_that_is_added(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = {i: token.content for i, token in added.items() if token.special}

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        eos_id: int | None = self._tokenizer.eos_token_id
        return eos_id

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    @property
    def special_strings(self) -> tuple[str, ...]:
        return tuple(self._special.values())

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def sha256(self) -> str:
        """The canonical hash of section 3 of the manifest: what ids mean and how a text becomes ids."""
        return tokenizer_sha256(self._tokenizer.get_vocab(), self.encode(TOKENIZER_PROBE_TEXT, special=True).ids)

    def template_sha256(self, renderer: RendererName) -> str:
        """Hash of the renderer: its name, and the chat template's source where it is the chat template."""
        template = self._tokenizer.chat_template if renderer == "chat" else ""
        return sha256_of_text(f"{renderer}\n{template}")

    def encode(self, text: str, *, special: bool) -> Pieces:
        backend = self._parsing if special else self._literal
        encoding = backend.encode(text, add_special_tokens=False)
        return Pieces(tuple(encoding.ids), tuple(encoding.offsets))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **dict(template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise refuse(
                "bad_template", f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        return rendered

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        stream = DecodeStream(skip_special_tokens=False)
        text, spans = "", []
        for token in ids:
            chunk = stream.step(self._parsing, token) or ""
            spans.append((len(text), len(text) + len(chunk)))
            text += chunk
        rest = str(self._parsing.decode(list(ids), skip_special_tokens=False))[len(text) :]
        if rest and spans:
            text += rest
            spans[-1] = (spans[-1][0], len(text))
        return text, tuple(spans)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(self._parsing.decode([token], skip_special_tokens=False)) for token in ids]


def load_tokenizer(folder: Path) -> TransformersTokenizer:
    """The tokenizer of a checkpoint folder. Raises CheckpointError where it cannot be read."""
    try:
        return TransformersTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error


def _bos_that_is_added(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos_id: int | None = tokenizer.bos_token_id
    if bos_id is None:
        return None
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return bos_id if ids and ids[0] == bos_id else None
