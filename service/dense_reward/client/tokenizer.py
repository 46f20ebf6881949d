"""Verifies that caller and service have the same tokenizer. Imports no tokenizer library."""

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
    """tokenizers.Tokenizer: its truncation and padding are state, not arguments."""

    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...


@runtime_checkable
class _WithIds(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


def sha256_of(tokenizer: CallersTokenizer) -> str:
    """The hash of a tokenizer, computed as for the manifest of a checkpoint."""
    if isinstance(tokenizer, _Truncating):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    encoding = tokenizer.encode(TOKENIZER_PROBE_TEXT, add_special_tokens=False)
    ids = encoding.ids if isinstance(encoding, _WithIds) else encoding
    return tokenizer_sha256(tokenizer.get_vocab(), np.asarray(ids).tolist())


def card_named(cards: Sequence[ModelCard], model: str | None) -> ModelCard:
    """The card of the pair `model`; None means the only one. Raises ValueError unless exactly one pair matches."""
    matching = [card for card in cards if model in (None, card.name)]
    if len(matching) != 1:
        served = ", ".join(card.name for card in cards) or "nothing yet (wait_until_ready)"
        cure = "" if len(cards) < 2 else ": name one of them"
        raise ValueError(f"model={model!r} does not name one pair; served: {served}{cure}")
    return matching[0]


def agreed_sha256(tokenizer: CallersTokenizer, card: ModelCard) -> str:
    """The hash if it is equal on both sides. Raises TokenizerMismatchError with both hashes if they differ."""
    own = sha256_of(tokenizer)
    if own != card.tokenizer_sha256:
        raise TokenizerMismatchError(own, card.tokenizer_sha256, card.name)
    return own
