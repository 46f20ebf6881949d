"""Token rewards from a running reward service, of one pair that stays the same. Must not know policies or losses."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

from dense_reward import (
    Client,
    ClientError,
    Scored,
    ScoredResponse,
    ScoreOptions,
    ServiceUnavailableError,
    TokenizerMismatchError,
)
from dense_reward.client.requests import ItemToScore
from dense_reward.client.tokenizer import card_named
from dense_reward.records import FloatArray, IdArray, Report
from dense_reward.reward import minus_kl
from dense_reward.schemas import ArrayName, ModelCard, SignalName

from dense_reward_trainer.configs.service import ServiceOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.runs.run_folder import without_secrets

Chat = list[dict[str, str]]
TOO_LONG = "too_long"
"""The service's code for an item that exceeds the pair's limit."""


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """The URL of a service, the name of a pair there (None: its only one), and the limits on requests.

    `patience_s`: how long the service can be unavailable. `timeout_s`: how long a response can take. `request_tokens`:
    about how many tokens a request has; a single prompt with its responses can exceed it.
    """

    url: str
    pair: str | None
    patience_s: float
    timeout_s: float
    request_tokens: int
    key_file: Path | None = None

    @property
    def shown(self) -> str:
        """The URL without a key in it."""
        return without_secrets(self.url)

    def key(self) -> str | None:
        """The API key in `key_file`. Raises ConfigError if it cannot be read or is empty."""
        if self.key_file is None:
            return None
        try:
            key = self.key_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"service_key_file: {self.key_file} cannot be read: {error}") from error
        if not key:
            raise ConfigError(f"service_key_file: {self.key_file} is empty: write the key into it")
        return key

    @classmethod
    def of(cls, url: str, config: ServiceOptions) -> Self:
        """The address in a configuration."""
        return cls(
            url,
            config.service_pair,
            config.service_patience_s,
            config.service_timeout_s,
            config.service_request_tokens,
            config.service_key_file,
        )


@dataclass(frozen=True, slots=True, eq=False)
class PinnedPair:
    """One pair of a service. Requests name its tokenizer and revision: the service refuses them (409) if it changed."""

    client: Client
    card: ModelCard
    request_tokens: int

    def check_tokenizer(self, tokenizer_sha256: str) -> None:
        """Raises JobError if the pair has a different tokenizer, in which our ids would mean different text."""
        if self.card.tokenizer_sha256 != tokenizer_sha256:
            mismatch = TokenizerMismatchError(tokenizer_sha256, self.card.tokenizer_sha256, self.card.name)
            raise JobError(f"the reward service cannot be used: {mismatch}")

    def score(self, items: Sequence[ItemToScore], include: Collection[ArrayName], top_k: int = 0) -> Scored:
        """One request. `top_k`: how many likeliest ids to return at each token. Raises JobError if the pair was
        swapped, or the service is unavailable beyond the patience.
        """
        try:
            return self.client.score_items(items, options=self._options(include, top_k))
        except ClientError as error:
            timed_out = isinstance(error, ServiceUnavailableError) and "ReadTimeout" in error.last
            cure = ": raise service_timeout_s, or lower service_request_tokens" if timed_out else ""
            raise JobError(f"the reward service did not score: {without_secrets(str(error))}{cure}") from error

    def score_chats(
        self, chats: Sequence[Chat], include: Collection[ArrayName], top_k: int = 0
    ) -> Iterator[ScoredResponse]:
        """Scores the last message of each chat. Requests have about `request_tokens`; a character counts as a token."""
        items: list[dict[str, object]] = []
        characters = 0
        for index, chat in enumerate(chats):
            items.append({"messages": chat})
            characters += sum(len(message["content"]) for message in chat)
            if characters >= self.request_tokens or index == len(chats) - 1:
                yield from self.score(items, include, top_k).results
                items, characters = [], 0

    def score_each(
        self, chats: Sequence[Chat], include: Collection[ArrayName], top_k: int = 0
    ) -> Iterator[ScoredResponse | None]:
        """Scores the last message of each chat, many requests at a time; None for a chat that is too long.

        Raises JobError like `score`, and for any other fault of a chat.
        """
        items = ({"messages": chat} for chat in chats)
        many = self.client.score_many(
            items,
            options=self._options(include, top_k),
            on_error="per_item",
            request_tokens=self.request_tokens,
            progress=False,
        )
        try:
            for scored in many:
                if scored.error is not None and scored.error.code != TOO_LONG:
                    raise JobError(f"the reward service did not score chat {scored.index}: {scored.error.message}")
                yield None if scored.error is not None else scored.results[0]
        except ClientError as error:
            raise JobError(f"the reward service did not score: {error}") from error

    def _options(self, include: Collection[ArrayName], top_k: int) -> ScoreOptions:
        return ScoreOptions(
            model=self.card.name,
            tokenizer_sha256=self.card.tokenizer_sha256,
            expect_revision=self.card.revision,
            include=sorted(include),
            top_k=top_k,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ServiceRewards:
    """TokenRewards of one pair. Requests are sent one after another, so that results do not depend on timing."""

    pair: PinnedPair
    signal: SignalName
    with_kl: bool

    @property
    def card(self) -> ModelCard:
        return self.pair.card

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """Raises JobError if the pair was swapped, or the service is unavailable for longer than the patience."""
        names: set[ArrayName] = {"sft_logprob", self.signal}
        if self.with_kl or (candidates is not None and self.signal == "centred"):
            names.add("kl")
        if candidates is not None:
            names.add("candidate_sft_logprob")
        rewards: list[ResponseRewards] = []
        for items in requests(rollouts, self.pair.request_tokens, candidates):
            rewards += [self._rewards(result) for result in self.pair.score(items, names).results]
        return rewards

    def _rewards(self, result: ScoredResponse) -> ResponseRewards:
        signal_T: FloatArray | None = getattr(result, self.signal)
        if signal_T is None or result.sft_logprob is None:
            raise JobError(f"the reward service returned no {self.signal} or no sft_logprob")
        return ResponseRewards(
            signal_T,
            result.sft_logprob,
            result.kl if self.with_kl else None,
            candidate_signal(self.signal, result.candidate_reward, result.candidate_sft_logprob, result.kl),
            result.candidate_sft_logprob,
        )


def candidate_signal(
    name: SignalName,
    reward_TK: FloatArray | None,
    sft_logprob_TK: FloatArray | None,
    kl_T: FloatArray | None,
) -> FloatArray | None:
    """The signal of candidates, [T, K], defined as that of sampled ids; None without candidates."""
    match name:
        case "reward":
            return reward_TK
        case "sft_logprob":
            return sft_logprob_TK
        case "centred":
            return None if reward_TK is None or kl_T is None else minus_kl(reward_TK, kl_T[:, None])


@contextmanager
def pinned_pair(address: ServiceAddress, report: Report) -> Iterator[PinnedPair]:
    """Waits until the service can score, and pins the pair that it serves.

    Raises ConfigError if the URL is invalid; JobError if the service cannot score within the patience, has no pair of
    that name, or has several and `address` names none.
    """
    with _cards(address, report, lambda cards: [_only_card(cards, address.pair)]) as (client, (card,)):
        yield PinnedPair(client, card, address.request_tokens)


@contextmanager
def pinned_pairs(
    address: ServiceAddress, names: Sequence[str] | None, report: Report
) -> Iterator[tuple[PinnedPair, ...]]:
    """Pins pairs of one SFT model: those of these names, or all that the service has. `address.pair` is not read.

    Raises like `pinned_pair`; JobError also if the pairs have several SFT models.
    """
    with _cards(address, report, lambda cards: cards_of_one_sft(cards, names)) as (client, cards):
        yield tuple(PinnedPair(client, card, address.request_tokens) for card in cards)


def _only_card(cards: Sequence[ModelCard], name: str | None) -> ModelCard:
    if name is None and len(cards) > 1:
        raise ValueError(
            f"it serves several pairs: set service_pair to one of {', '.join(card.name for card in cards)}"
        )
    return card_named(cards, name)


def cards_of_one_sft(cards: Sequence[ModelCard], names: Sequence[str] | None) -> list[ModelCard]:
    """The cards of these names in their order, or all, token heads last; they have one SFT model and one tokenizer.

    Raises ValueError for an unknown name, and if there are several SFT models or tokenizers.
    """
    chosen = list(cards) if names is None else [card_named(cards, name) for name in names]
    chosen.sort(key=lambda card: card.token_head is not None)
    models = {card.sft for card in chosen if card.token_head is None}
    if not chosen:
        raise ValueError("it serves nothing yet")
    if len({card.tokenizer_sha256 for card in chosen}) > 1:
        named = ", ".join(card.name for card in chosen)
        raise ValueError(f"{named} have several tokenizers: set service_pairs to those with one tokenizer")
    if len(models) > 1:
        served = ", ".join(f"{card.name}: {card.sft}" for card in chosen)
        raise ValueError(f"the pairs have several SFT models ({served}): set service_pairs to the pairs of one of them")
    return chosen


@contextmanager
def _cards(
    address: ServiceAddress, report: Report, choose: Callable[[Sequence[ModelCard]], list[ModelCard]]
) -> Iterator[tuple[Client, list[ModelCard]]]:
    """Waits until the service can score, and yields a client and the chosen cards. See `pinned_pair`."""
    try:
        key = address.key()
        client = Client(address.url, api_key=key, timeout_s=address.timeout_s, retry_for_s=address.patience_s)
    except ValueError as error:
        raise ConfigError(f"service_url: {error}") from error
    with client:
        report(f"waiting for {address.shown}, up to {address.patience_s:g} s")
        try:
            client.wait_until_ready(address.patience_s)
            cards = choose(client.models())
        except (ClientError, ValueError) as error:
            reason = without_secrets(str(error))
            absent = isinstance(error, ServiceUnavailableError)
            cure = ". Start it with dense-reward serve, or correct service_url" if absent else ""
            raise JobError(f"the reward service at {address.shown} cannot be used: {reason}{cure}") from error
        yield client, cards


@contextmanager
def connected(
    address: ServiceAddress, tokenizer_sha256: str, report: Report, *, signal: SignalName, with_kl: bool
) -> Iterator[ServiceRewards]:
    """A pinned pair as TokenRewards. Raises what `pinned_pair` raises, and JobError if the tokenizer differs."""
    with pinned_pair(address, report) as pair:
        pair.check_tokenizer(tokenizer_sha256)
        yield ServiceRewards(pair, signal, with_kl)


def requests(
    rollouts: Sequence[Rollout], limit_tokens: int, candidates: Sequence[IdArray] | None = None
) -> Iterator[list[dict[str, object]]]:
    """Requests of about `limit_tokens`, each a list of items; consecutive rollouts of one prompt share an item."""
    items: list[dict[str, object]] = []
    tokens = first = 0
    for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt_P.tobytes()):
        siblings = list(group)
        size = len(siblings[0].prompt_P) + sum(len(rollout.response_T) for rollout in siblings)
        if items and tokens + size > limit_tokens:
            yield items
            items, tokens = [], 0
        responses = [rollout.response_T for rollout in siblings]
        items.append({"prompt_ids": siblings[0].prompt_P, "response_ids": responses})
        if candidates is not None:
            items[-1]["candidate_ids"] = candidates[first : first + len(siblings)]
        first += len(siblings)
        tokens += size
    if items:
        yield items
