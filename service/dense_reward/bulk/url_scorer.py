"""Scores items with services behind URLs."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import fields

from dense_reward.bulk.local_scorer import ScoreTerms, identity_of, output_columns
from dense_reward.bulk.records import Faulty, Outcome
from dense_reward.bulk.windows import PartFailedError, halved_if_refused
from dense_reward.client.client import AsyncClient
from dense_reward.client.errors import ClientError, ScoringError
from dense_reward.client.requests import ScoreOptions
from dense_reward.client.scored_response import ScoredResponse
from dense_reward.credentials import without_credentials
from dense_reward.errors import BulkError, SettingsError
from dense_reward.schemas import Item, ModelCard
from dense_reward.waits import CLIENT_RETRY_FOR_S

WINDOW_CHARACTERS = 262_144
WINDOWS_EACH = 3
"""Windows that each service has at the same time: one is computed, one waits, one is on its way."""


EQUAL = ("name", "revision", "tokenizer_sha256", "max_length_tokens", "quantities")
"""What all services must have: which one scores a row must not matter."""


class UrlScorer:
    """Services of one pair. Each window goes to the service with the fewest; the revision of the start is pinned."""

    def __init__(self, urls: Sequence[str], api_key: str | None, terms: ScoreTerms) -> None:
        """Raises SettingsError for an invalid URL."""
        try:
            self._clients = {url: AsyncClient(url, retry_for_s=CLIENT_RETRY_FOR_S, api_key=api_key) for url in urls}
        except ValueError as error:
            raise SettingsError(f"--url: {error}") from None
        self._terms = terms
        self._waiting = dict.fromkeys(urls, 0)
        self._options = ScoreOptions()
        self.card: ModelCard

    @property
    def characters(self) -> int:
        return WINDOW_CHARACTERS

    @property
    def parallel(self) -> int:
        return WINDOWS_EACH * len(self._clients)

    @property
    def identity(self) -> Mapping[str, object]:
        return identity_of(self.card)

    async def start(self) -> None:
        """Ask every service what it serves. Raises BulkError if one does not answer, or serves something else."""
        cards = await asyncio.gather(*(self._card_of(url) for url in self._clients))
        first = cards[0]
        for url, card in zip(self._clients, cards, strict=True):
            if different := [name for name in EQUAL if getattr(card, name) != getattr(first, name)]:
                one, other = (getattr(each, different[0]) for each in (card, first))
                raise BulkError(
                    f"{without_credentials(url)} serves {different[0]} {one}, but "
                    f"{without_credentials(next(iter(self._clients)))} {other}: give URLs of equal "
                    "services, and --model if each has several pairs"
                )
        self.card = first
        self._options = ScoreOptions(
            render=self._terms.render,
            add_eos=self._terms.add_eos,
            model=first.name,
            priority="bulk",
            tokenizer_sha256=first.tokenizer_sha256,
            expect_revision=first.revision,
            include=self._terms.offered_by(first),
        )

    async def score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        return await halved_if_refused(items, self._score)

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _card_of(self, url: str) -> ModelCard:
        try:
            cards = await self._clients[url].models()
        except ClientError as error:
            raise BulkError(f"{without_credentials(url)}: {error}") from None
        for card in cards:
            if self._terms.model in (None, card.name):
                return card
        names = ", ".join(card.name for card in cards)
        raise BulkError(f"{without_credentials(url)} has no pair {self._terms.model!r}: --model must be one of {names}")

    async def _score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        url = min(self._waiting, key=lambda url: self._waiting[url])
        self._waiting[url] += 1
        sent = [item.model_dump(exclude_none=True) for item in items]
        try:
            scored = await self._clients[url].score_items(sent, on_error="per_item", options=self._options)
        except ScoringError as error:
            late = error.code == "deadline_exceeded"
            if error.code in {"body_too_large", "too_long", "out_of_memory"} or (late and len(items) > 1):
                raise PartFailedError(str(error)) from None
            raise BulkError(f"{without_credentials(url)}: {error}") from None
        except ClientError as error:
            raise BulkError(f"{without_credentials(url)}: {error}") from None
        except (TypeError, ValueError) as error:  # the client refuses what JSON cannot hold
            raise PartFailedError(str(error)) from None
        finally:
            self._waiting[url] -= 1
        usage = scored.usage
        return _outcomes(len(items), scored.results, self._terms.columns), usage.prompt_tokens + usage.response_tokens


def _outcomes(count: int, results: Sequence[ScoredResponse], include: Sequence[str]) -> list[Outcome]:
    found: list[list[dict[str, object]]] = [[] for _ in range(count)]
    failed: dict[int, Faulty] = {}
    for result in results:
        if result.error is not None:
            failed[result.item] = Faulty(f"{result.error.code}: {result.error.message}")
        else:
            found[result.item].append(_columns(result, include))
    return [failed.get(index, responses) for index, responses in enumerate(found)]


def _columns(result: ScoredResponse, include: Sequence[str]) -> dict[str, object]:
    """The columns of a local scorer: token_ids, which the client always gets for ids, only if they are included."""
    values = {each.name: getattr(result, each.name) for each in fields(result) if each.name != "error"}
    always = {"sum", "mean", "min", "length"}
    wanted = {*include, *always, "candidate_reward", "segments", *({"text", "offsets"} if "tokens" in include else ())}
    present = {name: v for name, v in values.items() if name in wanted and (v is not None or name in always)}
    return output_columns(present, include)
