"""The pairs that a client has pinned: all its later requests to them name their tokenizer and revision.

The service refuses a request (409) whose tokenizer or revision it does not serve. So a service that was restarted with
another reference is an error, and not other rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dense_reward.client.requests import ScoreOptions
from dense_reward.schemas import ModelCard


@dataclass(slots=True)
class Pins:
    """By name of the pair. None: requests that name no pair, which the service answers with its first one."""

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
