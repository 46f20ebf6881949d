"""Verifies that caller and service have the same tokenizer, and keeps it so. Imports no tokenizer library."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from dense_reward.client.errors import TokenizerMismatchError
from dense_reward.client.requests import ScoreOptions
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


@dataclass(slots=True)
class Pins:
    """The pairs that a client has pinned: all its later requests to them name their tokenizer and revision.

    The service refuses a request (409) whose tokenizer or revision it does not serve. So a service that was restarted
    with another reference is an error, and not other rewards.
    """

    # By name of the pair. None: requests that name no pair, which the service answers with its first one.
    _cards: dict[str | None, ModelCard] = field(default_factory=dict)

    def pin(self, card: ModelCard, *, also_unnamed: bool) -> None:
        """Pins the pair of this card. `also_unnamed`: requests that name no pair get this one."""
        self._cards[card.name] = card
        if also_unnamed:
            self._cards[None] = card

    def pin_one_of(self, card: ModelCard, served: Sequence[ModelCard]) -> None:
        self.pin(card, also_unnamed=card.name == served[0].name)

    def unpin(self, name: str | None) -> None:
        """Forgets the pair of this name; None: all."""
        gone = [key for key, card in self._cards.items() if name in (None, card.name)]
        for key in gone:
            del self._cards[key]

    def applied(self, options: ScoreOptions) -> ScoreOptions:
        """The options with what is pinned for their pair. Raises ValueError if they name something else themselves."""
        card = self._cards.get(options.model)
        if card is None:
            return options
        for name, value in (("tokenizer_sha256", card.tokenizer_sha256), ("expect_revision", card.revision)):
            given = getattr(options, name)
            if given not in (None, value):
                raise ValueError(
                    f"ScoreOptions.{name} is {given}, but this client pinned {value} for {card.name}: "
                    f"leave {name} out, or call unpin() or check_tokenizer() first"
                )
        return replace(options, model=card.name, tokenizer_sha256=card.tokenizer_sha256, expect_revision=card.revision)
