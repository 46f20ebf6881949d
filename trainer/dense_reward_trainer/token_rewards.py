"""What training needs of the reward service, and the service behind it. Must not know policies or losses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from dense_reward import Client, ClientError, ScoredResponse, ScoreOptions, TokenizerMismatchError
from dense_reward.client.tokenizer import card_named
from dense_reward.engine.base import FloatArray
from dense_reward.schemas import ArrayName, ModelCard, SignalName

from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rollout import Rollout

# Small enough for any service's limits on bodies and queues, large enough to fill its batches.
REQUEST_TOKENS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class ResponseRewards:
    """Of one response, one number for each of its ids, in nats at temperature 1. `kl_T` only where it was asked for.

    There is nothing here for an end of turn that the response does not hold.
    """

    signal_T: FloatArray
    sft_logprob_T: FloatArray
    kl_T: FloatArray | None = None


class TokenRewards(Protocol):
    """A source of token rewards."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        """The rewards of the very ids of each rollout, in order."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """Where a service is, which of its pairs is meant (None: the only one), and how long it may be away."""

    url: str
    pair: str | None
    patience_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True, eq=False)
class ServiceRewards:
    """Asks one pair of a service, request after request, so that an answer does not depend on timing.

    Every request names tokenizer and revision: a service that was restarted with another pair is refused (409).
    """

    client: Client
    card: ModelCard
    signal: SignalName
    with_kl: bool

    def score(self, rollouts: Sequence[Rollout]) -> list[ResponseRewards]:
        """Raises JobError where the pair was swapped, or where the service stays away for longer than the patience."""
        names: set[ArrayName] = {"sft_logprob", self.signal}
        options = ScoreOptions(
            model=self.card.name,
            tokenizer_sha256=self.card.tokenizer_sha256,
            expect_revision=self.card.revision,
            include=sorted(names | {"kl"} if self.with_kl else names),
        )
        rewards: list[ResponseRewards] = []
        for items in _requests(rollouts):
            try:
                scored = self.client.score_items(items, options=options)
            except ClientError as error:
                raise JobError(f"the reward service did not score: {error}") from error
            rewards += [self._rewards(result) for result in scored.results]
        return rewards

    def _rewards(self, result: ScoredResponse) -> ResponseRewards:
        signal_T: FloatArray | None = getattr(result, self.signal)
        if signal_T is None or result.sft_logprob is None:
            raise JobError(f"the reward service answered without {self.signal} or sft_logprob")
        return ResponseRewards(signal_T, result.sft_logprob, result.kl)


@contextmanager
def connected(
    address: ServiceAddress, tokenizer_sha256: str, *, signal: SignalName, with_kl: bool
) -> Iterator[ServiceRewards]:
    """Waits until the service can score, and pins the pair that it serves.

    Raises JobError where it cannot for longer than the patience, where ids would mean something else there, or where
    the name is not that of one pair.
    """
    try:
        client = Client(address.url, timeout_s=address.timeout_s, retry_for_s=address.patience_s)
    except ValueError as error:
        raise ConfigError(f"service_url: {error}") from error
    with client:
        yield ServiceRewards(client, _card(client, address, tokenizer_sha256), signal, with_kl)


def _card(client: Client, address: ServiceAddress, tokenizer_sha256: str) -> ModelCard:
    try:
        client.wait_until_ready(address.patience_s)
        card = card_named(client.models(), address.pair)
        if card.tokenizer_sha256 != tokenizer_sha256:
            raise TokenizerMismatchError(tokenizer_sha256, card.tokenizer_sha256, card.name)
    except (ClientError, ValueError) as error:
        raise JobError(f"the reward service at {address.url} cannot be used: {error}") from error
    return card


def _requests(rollouts: Sequence[Rollout]) -> Iterator[list[dict[str, object]]]:
    """Items of neighbouring rollouts to one prompt, in order, in requests of about REQUEST_TOKENS."""
    items: list[dict[str, object]] = []
    tokens = 0
    for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt_P.tobytes()):
        siblings = list(group)
        size = len(siblings[0].prompt_P) + sum(len(rollout.response_T) for rollout in siblings)
        if items and tokens + size > REQUEST_TOKENS:
            yield items
            items, tokens = [], 0
        responses = [rollout.response_T for rollout in siblings]
        items.append({"prompt_ids": siblings[0].prompt_P, "response_ids": responses})
        tokens += size
    if items:
        yield items
