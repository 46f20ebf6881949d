"""Proof that a caller's ids mean to the service what they mean to the caller. Imports no tokenizer library."""

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dense_reward.client.errors import TokenizerMismatchError
from dense_reward.manifest import TOKENIZER_PROBE_TEXT, tokenizer_sha256
from dense_reward.schemas import ModelCard


class CallersTokenizer(Protocol):
    """A tokenizer of transformers (encode gives ids) or of tokenizers (encode gives an object with ids)."""

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, /, *, add_special_tokens: bool) -> object: ...


@runtime_checkable
class _Truncating(Protocol):
    """tokenizers.Tokenizer, whose truncation and padding are state rather than arguments."""

    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...


@runtime_checkable
class _WithIds(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


def sha256_of(tokenizer: CallersTokenizer) -> str:
    """The hash that the service computes of its own tokenizer when a checkpoint is made."""
    if isinstance(tokenizer, _Truncating):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    encoding = tokenizer.encode(TOKENIZER_PROBE_TEXT, add_special_tokens=False)
    ids = encoding.ids if isinstance(encoding, _WithIds) else encoding
    return tokenizer_sha256(tokenizer.get_vocab(), np.asarray(ids).tolist())


def card_named(cards: Sequence[ModelCard], model: str | None) -> ModelCard:
    """The card of a pair; without a name, the only one. Raises ValueError where that names none."""
    named = [card for card in cards if model in (None, card.name)]
    if len(named) != 1:
        served = ", ".join(card.name for card in cards) or "nothing yet (wait_until_ready)"
        raise ValueError(f"model={model!r} does not name one pair; served: {served}")
    return named[0]


def agreed_sha256(tokenizer: CallersTokenizer, card: ModelCard) -> str:
    """The hash that both sides have. Raises TokenizerMismatchError, naming both, where they differ."""
    own = sha256_of(tokenizer)
    if own != card.tokenizer_sha256:
        raise TokenizerMismatchError(own, card.tokenizer_sha256, card.name)
    return own
