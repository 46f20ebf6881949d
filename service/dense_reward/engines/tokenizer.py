"""Adapts a transformers tokenizer to the Tokenizer protocol of text/encode. Only this module reads chat templates."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dense_reward.engines.template_form import template_form
from dense_reward.errors import CheckpointError, refuse
from dense_reward.manifest import TOKENIZER_PROBE_TEXT, sha256_of_text, tokenizer_sha256
from dense_reward.text.encode import Pieces, RendererName
from dense_reward.text.messages import for_template
from dense_reward.text.offsets import Span, decoded_spans
from dense_reward.text.special_tokens import JsonValue, Message

# Arguments that callers may not pass to a template: our own, and those that would replace the checkpoint's template.
_RESERVED = frozenset(
    {"messages", "conversations", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    - {"documents"}
)

ROOMY_TOKEN_BYTES = 128
"""Least value of `longest_token_bytes`: normalisers drop text, and unknown characters in a row can become one token."""


class TransformersTokenizer:
    """Two copies of one backend: `_parsing` turns special-token strings into their ids, `_literal` reads them as text.

    Two, because the switch between them is state of the backend and would leak between threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(
                f"{type(tokenizer).__name__} has no fast backend, so it gives no token offsets: "
                "convert it with transformers (it writes tokenizer.json) and adopt the checkpoint again"
            )
        self._tokenizer = tokenizer
        self._parsing: Backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._parsing.post_processor = None  # it adds BOS, and can exclude spaces from offsets
        self._literal: Backend = copy.deepcopy(self._parsing)
        self._parsing.encode_special_tokens = False
        self._literal.encode_special_tokens = True
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._vocab_size = max(vocabulary.values()) + 1
        self._longest_token_bytes: int = max(ROOMY_TOKEN_BYTES, *(len(piece.encode()) for piece in vocabulary))
        self._bos_id = _bos_that_is_added(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = {i: token.content for i, token in added.items() if token.special}
        self._not_text = self._special.keys() - {tokenizer.unk_token_id}

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        eos_id: int | None = self._tokenizer.eos_token_id
        return eos_id

    @property
    def longest_token_bytes(self) -> int:
        return self._longest_token_bytes

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    @property
    def special_strings(self) -> tuple[str, ...]:
        return tuple(self._special.values())

    @property
    def transformers_tokenizer(self) -> PreTrainedTokenizerFast:
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def sha256(self) -> str:
        """The canonical hash of section 3 of the manifest: what ids mean and how a text becomes ids."""
        return tokenizer_sha256(self._tokenizer.get_vocab(), self.encode(TOKENIZER_PROBE_TEXT, special=True).ids)

    def template_sha256(self, renderer: RendererName) -> str:
        """Hash of the renderer: its name, and for the renderer chat also the template's source."""
        template = self._tokenizer.chat_template if renderer == "chat" else ""
        return sha256_of_text(f"{renderer}\n{template}")

    def encode(self, text: str, *, special: bool) -> Pieces:
        if not special:
            return self._literally(text)
        encoding = self._parsing.encode(text, add_special_tokens=False)
        return Pieces(tuple(encoding.ids), tuple(encoding.offsets))

    def _literally(self, text: str) -> Pieces:
        """Cuts text that became a special token in two: Unigram models match their special tokens in text."""
        encoding = self._literal.encode(text, add_special_tokens=False)
        pieces = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for token, (start, end) in pieces if token in self._not_text and end - start > 1]
        if not cuts:
            return Pieces(tuple(encoding.ids), tuple(encoding.offsets))
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            part = self._literally(text[start:end])
            ids.extend(part.ids)
            offsets.extend((start + first, start + last) for first, last in part.offsets)
        return Pieces(tuple(ids), tuple(offsets))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
    ) -> str:
        reserved = sorted((template_kwargs or {}).keys() & (_RESERVED | self._tokenizer.special_tokens_map.keys()))
        if reserved:
            message = (
                f"template_kwargs sets {reserved[0]}, which is reserved: set only variables of the template itself"
            )
            raise refuse("bad_template", message, param="template_kwargs")
        try:
            form = template_form(self._tokenizer.get_chat_template(tools=None if tools is None else list(tools)))
            taken = for_template(messages, parts=form.parts, developer=form.developer)
            rendered: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in taken],
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **dict(template_kwargs or {}),
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise refuse(
                "bad_template", f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        return rendered

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        return decoded_spans(ids, self._decode)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._parsing.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._decode([token]) for token in ids]


def load_tokenizer(folder: Path) -> TransformersTokenizer:
    """The tokenizer of a checkpoint folder. Runs no code of the folder. Raises CheckpointError if it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return TransformersTokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error


def _bos_that_is_added(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id, if the tokenizer itself puts it before a text."""
    bos_id: int | None = tokenizer.bos_token_id
    if bos_id is None:
        return None
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return bos_id if ids and ids[0] == bos_id else None
