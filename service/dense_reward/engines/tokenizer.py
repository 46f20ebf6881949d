"""Adapts a transformers tokenizer to the Tokenizer protocol of text/encode. Only this module reads chat templates."""

import ast
import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date as day
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, TemplateError
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dense_reward.engines.long_texts import encoding_of
from dense_reward.engines.template_form import template_form
from dense_reward.engines.template_variables import variables_of
from dense_reward.engines.time_limit import within
from dense_reward.engines.weight_files import check_tokenizer_files
from dense_reward.errors import CheckpointError, refuse
from dense_reward.manifest import TOKENIZER_PROBE_TEXT, sha256_of_text, tokenizer_sha256
from dense_reward.text.messages import for_template, without_printed_parts
from dense_reward.text.offsets import Span, decoded_spans
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.tokenizer import Pieces, RendererName

# Arguments that callers may not pass to a template: our own, and those that would replace the checkpoint's template.
_RESERVED = frozenset(
    {"messages", "conversations", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    - {"documents"}
)

_WORD = re.compile(r"\w+")
_DATE_CALL = re.compile(r"\bstrftime_now\s*\(")
_DATE_FORMAT = re.compile(r"""\bstrftime_now\s*\(\s*("[^"\n]*"|'[^'\n]*')\s*\)""")
# The line break after the block is not rendered (trim_blocks); it lets the template begin on a line of its own.
_LOOKED_UP_DATE = "{% macro strftime_now(format) %}{{ dense_reward_dates[format] }}{% endmacro %}\n"
# What a template finds in its environment, and what renders a chat.
_NOT_OF_USERS = frozenset(
    {*Environment().globals, "messages", "tools", "add_generation_prompt", "raise_exception"}
    | {"strftime_now", "bos_token", "eos_token", "unk_token", "pad_token"}
)

RENDERING_S = 10.0
"""Limit on each rendering of a chat: a template that does not end must not stop adoption, a start, or a thread."""
RENDERINGS = 4
"""Times that the first chat is rendered: templates can draw random words."""
MAX_RENDERED_CHARACTERS = 1_000_000
"""Limit on the first rendering, which is of a short chat."""
UNRENDERABLE = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError, TimeoutError),
)
"""What rendering a broken template raises."""
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
        unprefixed = _without_dummy_prefix(self._parsing)
        self._continuing: Backend | None = unprefixed
        self._literally_continuing: Backend | None = copy.deepcopy(unprefixed)
        for backend, literal in (
            (self._parsing, False),
            (self._literal, True),
            (self._continuing, False),
            (self._literally_continuing, True),
        ):
            if backend is not None:
                backend.encode_special_tokens = literal
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._vocab_size = max(vocabulary.values()) + 1
        self._longest_token_bytes: int = max(ROOMY_TOKEN_BYTES, *(len(piece.encode()) for piece in vocabulary))
        self._bos_id = _bos_that_is_added(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = {i: token.content for i, token in added.items() if token.special}
        self._not_text = self._special.keys() - {tokenizer.unk_token_id}
        self._has_rendered = False

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

    @property
    def has_dummy_prefix(self) -> bool:
        return self._continuing is not None

    @property
    def template_variables(self) -> frozenset[str]:
        own: frozenset[str] = frozenset(self._tokenizer.special_tokens_map)
        read: frozenset[str] = frozenset().union(*map(variables_of, self._template_sources()))
        return read - _NOT_OF_USERS - own

    @property
    def asks_for_the_date(self) -> bool:
        """Whether the chat template, or the one for chats with tools, writes the day on which it is rendered."""
        return any("strftime_now" in _WORD.findall(source) for source in self._template_sources())

    def _template_sources(self) -> tuple[str, ...]:
        """The chat template; several if tools, for example, have one of their own."""
        templates: object = self._tokenizer.chat_template
        if isinstance(templates, dict):
            return tuple(map(str, templates.values()))
        return () if templates is None else (str(templates),)

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        if continues and self._continuing is not None:
            return self._continued(text, special, self._continuing, at_most)
        if not special:
            return self._literally(text, self._literal, at_most)
        encoding = encoding_of(self._parsing, text, at_most)
        return Pieces(tuple(encoding.ids), tuple(encoding.offsets))

    def _continued(self, text: str, special: bool, continuing: Backend, at_most: int | None) -> Pieces:
        """Without the dummy prefix before the text; after its special tokens there can be one, as in any text."""
        if not special:
            return self._literally(text, self._literally_continuing or continuing, at_most)
        encoding = encoding_of(continuing, text, at_most)
        first = next((at for at, token in enumerate(encoding.ids) if token in self._not_text), None)
        if first is None:
            return Pieces(tuple(encoding.ids), tuple(encoding.offsets))
        cut = encoding.offsets[first][0]
        rest = self.encode(text[cut:], special=True)
        offsets = (*encoding.offsets[:first], *((cut + start, cut + end) for start, end in rest.offsets))
        return Pieces((*encoding.ids[:first], *rest.ids), offsets)

    def _literally(self, text: str, backend: Backend, at_most: int | None = None) -> Pieces:
        """Cuts text that became a special token in two: Unigram models match their special tokens in text."""
        encoding = encoding_of(backend, text, at_most)
        pieces = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for token, (start, end) in pieces if token in self._not_text and end - start > 1]
        if not cuts:
            return Pieces(tuple(encoding.ids), tuple(encoding.offsets))
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            part = self._literally(text[start:end], backend if not start else self._literally_continuing or backend)
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
        date: str | None = None,
    ) -> str:
        reserved = sorted((template_kwargs or {}).keys() & (_RESERVED | self._tokenizer.special_tokens_map.keys()))
        if reserved:
            message = (
                f"template_kwargs sets {reserved[0]}, which is reserved: set only variables of the template itself"
            )
            raise refuse("bad_template", message, param="template_kwargs")
        self._refuse_unread(template_kwargs or {})
        try:
            pinned = {} if date is None else self._pinned(date, tools)
            form = template_form(self._tokenizer.get_chat_template(tools=None if tools is None else list(tools)))
            taken = for_template(messages, parts=form.parts, developer=form.developer)
            arguments: dict[str, JsonValue] = {**dict(template_kwargs or {}), **pinned}

            def written(chat: Sequence[Message]) -> str:
                return str(
                    self._tokenizer.apply_chat_template(
                        [dict(message) for message in chat],
                        tools=None if tools is None else list(tools),
                        tokenize=False,
                        add_generation_prompt=generation_prompt,
                        **arguments,
                    )
                )

            def render() -> str:
                rendered = written(taken)
                joined = without_printed_parts(taken, rendered) if form.parts else None
                return rendered if joined is None else written(joined)

            return within(RENDERING_S, render) if self._has_rendered else self._first_rendering(render)
        except UNRENDERABLE as error:
            reason = str(error).strip() or type(error).__name__
            raise refuse(
                "bad_template", f"the chat template refuses these messages: {reason}", param="messages"
            ) from None

    def _first_rendering(self, render: Callable[[], str]) -> str:
        """The rendering, if it ends, is always the same, and is not far too long. Raises TimeoutError or ValueError."""
        rendered, *again = within(RENDERING_S, lambda: [render() for _ in range(RENDERINGS)])
        if any(other != rendered for other in again):
            raise ValueError("it renders one chat in different ways, so the same text would get different rewards")
        if len(rendered) > MAX_RENDERED_CHARACTERS:
            raise ValueError(f"it makes {len(rendered)} characters of one chat, more than {MAX_RENDERED_CHARACTERS}")
        self._has_rendered = True
        return rendered

    def _refuse_unread(self, template_kwargs: Mapping[str, JsonValue]) -> None:
        """Raises RequestError(bad_template) for a variable that the template does not read: it would change nothing."""
        variables = self.template_variables if template_kwargs else frozenset()
        unread = sorted(template_kwargs.keys() - variables)
        if unread:
            known = f"it reads {', '.join(sorted(variables))}" if variables else "it reads none"
            message = f"the chat template reads no variable {unread[0]!r} ({known}): leave it out"
            raise refuse("bad_template", message, param="template_kwargs")

    def _pinned(self, date: str, tools: Sequence[JsonValue] | None) -> dict[str, JsonValue]:
        """Arguments of apply_chat_template with which a template that asks for the date gets this one.

        A template can be given only data, no function, so its own `strftime_now` looks up the formats that it uses.
        """
        source = str(self._tokenizer.get_chat_template(tools=tools))
        formats = [_text(text) for text in _DATE_FORMAT.findall(source)]
        if len(formats) != len(_DATE_CALL.findall(source)):
            message = "the chat template computes the format of its date, so the date cannot be fixed: write the format"
            raise refuse("bad_template", f"{message} as a string in the template", param="messages")
        if not formats:
            return {}
        on = day.fromisoformat(date)
        dates: dict[str, JsonValue] = {text: on.strftime(text) for text in formats}
        return {"chat_template": _LOOKED_UP_DATE + source, "dense_reward_dates": dates}

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        return decoded_spans(ids, self.text)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._parsing.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.text([token]) for token in ids]


def load_tokenizer(folder: Path) -> TransformersTokenizer:
    """The tokenizer of a checkpoint folder. Runs no code of the folder.

    Raises CheckpointError if it cannot be read, or gives no token to some plain text, which would then be lost.
    """
    return adapted_tokenizer(read_tokenizer(folder), folder)


def adapted_tokenizer(loaded: PreTrainedTokenizerBase, folder: Path) -> TransformersTokenizer:
    """What load_tokenizer makes of transformers' own tokenizer of a folder."""
    try:
        tokenizer = TransformersTokenizer(loaded)
        pieces = tokenizer.encode(TOKENIZER_PROBE_TEXT, special=True)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise _unusable(folder, error) from error
    if lost := _lost_of_bytes(tokenizer, pieces):
        raise CheckpointError(
            f"{folder}: its tokenizer has a token for every byte, but gives none for {', '.join(map(repr, lost[:5]))}: "
            "its vocabulary or pre-tokenizer is damaged, so copy the tokenizer's files again from the checkpoint"
        )
    return tokenizer


def _lost_of_bytes(tokenizer: TransformersTokenizer, pieces: Pieces) -> list[str]:
    """Characters of the probe's text without a token, if the tokenizer is one of bytes; others can lack characters."""
    if "ByteLevel" not in repr(tokenizer.transformers_tokenizer.backend_tokenizer.decoder):
        return []
    kept = {at for start, end in pieces.offsets for at in range(start, end)}
    text = enumerate(TOKENIZER_PROBE_TEXT)
    return sorted({c for at, c in text if at not in kept and (c.isalnum() or c == " ")})


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The same as transformers' own class, which trainers need. Raises CheckpointError if it cannot be read."""
    check_tokenizer_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{folder}: no usable tokenizer ({reason}): copy the tokenizer's files again from the checkpoint"
    )


def _without_dummy_prefix(backend: Backend) -> Backend | None:
    """A copy that puts no space before a text; None if the tokenizer puts none there."""
    description = json.loads(backend.to_str())
    changed = [_remove_dummy_prefix(description[name]) for name in ("normalizer", "pre_tokenizer")]
    if not any(changed):
        return None
    copied = Backend.from_str(json.dumps(description))
    copied.no_truncation()
    copied.no_padding()
    return copied


def _remove_dummy_prefix(part: object) -> bool:
    """Change the description of a normaliser or pre-tokenizer, and of its inner ones; whether there was a prefix."""
    if isinstance(part, list):
        return any([_remove_dummy_prefix(one) for one in part])  # noqa: C419 - change all
    if not isinstance(part, dict):
        return False
    found = _remove_dummy_prefix(part.get("normalizers", part.get("pretokenizers")))
    match part["type"]:
        case "Prepend":
            found, part["prepend"] = True, ""
        case "Metaspace" if part.get("prepend_scheme", "always") != "never":
            found, part["prepend_scheme"] = True, "never"
        case "ByteLevel" if part.get("add_prefix_space"):
            found, part["add_prefix_space"] = True, False
    return found


@lru_cache(maxsize=64)
def _text(literal: str) -> str:
    """The text of a string literal of a template."""
    return str(ast.literal_eval(literal))


def _bos_that_is_added(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id, if the tokenizer itself puts it before a text."""
    bos_id: int | None = tokenizer.bos_token_id
    if bos_id is None:
        return None
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return bos_id if ids and ids[0] == bos_id else None
