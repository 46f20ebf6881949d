"""Scores items with a pair that is loaded into this process, the way a service does, without HTTP."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dense_reward.bulk.arguments import DEFAULT_ARRAYS
from dense_reward.bulk.records import Faulty, Outcome
from dense_reward.bulk.windows import PartFailedError, halved_if_refused
from dense_reward.errors import BulkError, EngineLostError, Fault, OutOfMemoryError, RequestError, SequenceError
from dense_reward.schemas import ArrayName, Item, ModelCard, ScoreRequest
from dense_reward.scoring.rows import Row
from dense_reward.serving.loaders import loader
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.serving.service import Service
from dense_reward.settings import Settings
from dense_reward.waits import CLIENT_RETRY_FOR_S

log = logging.getLogger("dense_reward")
"""How long an engine on other servers may be unavailable."""
WITHOUT_LIMIT = 2**50
"""Tokens in the queue: the windows limit the memory here."""
POLL_S = 0.02
DRAIN_S = 2
"""Only an interrupted run has work left at its end, whose rows are computed again."""
REPLACEMENT = "\ufffd"
CHARACTERS_PER_TOKEN, WINDOW_BATCHES = 4, 8
"""A window of several batches: the last one of a window is seldom full, unless the next window is there."""


@dataclass(frozen=True, slots=True)
class ScoreTerms:
    """Options of all items. `include`: the arrays per token; empty: those of DEFAULT_ARRAYS that the pair offers."""

    include: tuple[ArrayName, ...] = ()
    model: str | None = None
    render: Literal["chat", "raw"] | None = None
    add_eos: bool | None = None

    @property
    def columns(self) -> tuple[ArrayName, ...]:
        """All arrays that the output can have."""
        return self.include or DEFAULT_ARRAYS

    def offered_by(self, card: ModelCard) -> tuple[ArrayName, ...]:
        """The arrays to request. A token head has no log-probs; if they are named, it refuses them itself."""
        absent = {"sft_logprob", "reference_logprob"} - card.offered
        wanted = self.include or tuple(name for name in DEFAULT_ARRAYS if name not in absent)
        of_tokens: tuple[ArrayName, ...] = ("text", "offsets") if "tokens" in wanted else ()
        return tuple(dict.fromkeys((*wanted, *of_tokens)))


def chosen_pair(settings: Settings, model: str | None) -> Settings:
    """The settings of one pair of several. Raises SettingsError, CheckpointError, or BulkError for an unknown name."""
    pairs = first_pairs(settings)
    for pair in pairs:
        if model in (None, pair.name):
            own = {"run": None, "pairs_file": None, "max_queue_tokens": WITHOUT_LIMIT, "drain_s": DRAIN_S}
            return pair.model_copy(update=own)
    raise BulkError(f"there is no pair {model!r}: --model must be one of {', '.join(pair.name for pair in pairs)}")


class LocalScorer:
    """One pair. Two windows at a time keep the device busy: one is computed while the next one is encoded."""

    parallel = 2

    def __init__(self, settings: Settings, terms: ScoreTerms) -> None:
        self._terms = terms
        self._settings = settings
        self._service = Service(settings, loader(settings.engine), lambda: None)

    async def start(self) -> None:
        """Load and verify the pair. Raises BulkError."""
        self._service.start()
        while self._service.state == "starting":
            await asyncio.sleep(POLL_S)
        if self._service.state != "ready":
            raise BulkError(self._service.progress)

    @property
    def characters(self) -> int:
        return CHARACTERS_PER_TOKEN * WINDOW_BATCHES * self._settings.max_batch_tokens

    @property
    def card(self) -> ModelCard:
        return self._service.cards()[0]

    @property
    def identity(self) -> Mapping[str, object]:
        return identity_of(self.card)

    async def score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        return await halved_if_refused(items, self._score)

    async def close(self) -> None:
        """Does not wait for models that are still loading: no row depends on them."""
        if self._service.state != "starting":
            await self._service.stop()

    async def _score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        if len(items) > self._settings.max_items:
            raise PartFailedError("more items than --max-items")
        request = ScoreRequest.model_validate(
            {
                "items": list(items),
                "include": list(self._terms.offered_by(self.card)),
                "render": self._terms.render,
                "add_eos": self._terms.add_eos,
                "on_error": "per_item",
            }
        )
        give_up_at = time.monotonic() + CLIENT_RETRY_FOR_S
        while True:
            try:
                with self._service.batcher.admission.permit(0) as permit:
                    answer = await self._service.scorer().score(request, permit)
                tokens = answer.prompt_tokens + answer.response_tokens
                return outcomes(len(items), answer.rows, answer.faults, self._terms.columns), tokens
            except RequestError as error:
                if error.code == "out_of_memory":
                    raise PartFailedError(str(error)) from None
                if error.code != "engine_unavailable" or time.monotonic() > give_up_at:
                    raise BulkError(f"{error.code}: {error}") from None
                log.warning("%s: trying again", error)
                await asyncio.sleep(error.retry_after_s or 1.0)
            except (SequenceError, OutOfMemoryError) as error:
                raise PartFailedError(str(error)) from None
            except EngineLostError as error:
                raise BulkError(f"the device failed ({error}): run the same command again") from None


def identity_of(card: ModelCard) -> Mapping[str, object]:
    """What rewards depend on."""
    return {"model": card.name, "revision": card.revision, "tokenizer_sha256": card.tokenizer_sha256}


def outcomes(count: int, rows: Sequence[Row], faults: Sequence[Fault], include: Sequence[str]) -> list[Outcome]:
    """The rows of an answer by item; an item with a fault has no rows."""
    found: list[list[dict[str, object]]] = [[] for _ in range(count)]
    for row in rows:
        index = row["item"]
        assert isinstance(index, int)
        found[index].append(output_columns(row, include))
    failed = {fault.item: Faulty(f"{fault.code}: {fault.message}") for fault in faults}
    return [failed.get(index, responses) for index, responses in enumerate(found)]


def output_columns(row: Mapping[str, Any], include: Sequence[str]) -> dict[str, object]:
    """The columns of a response's scores; `tokens` are parts of its text."""
    renamed = {"segments": "segment_rewards"}
    columns = {renamed.get(name, name): value for name, value in row.items() if name not in {"item", "response"}}
    if "tokens" in include:
        columns["tokens"] = token_texts(row["tokens"], row["text"], row["offsets"])
    return {name: value for name, value in columns.items() if name in include or name not in {"text", "offsets"}}


def token_texts(pieces: Sequence[str], text: str, offsets: Sequence[Sequence[int]]) -> list[str]:
    """The part of the text that each token is, so that they join to it.

    A token that is decoded alone loses the space before a word (SentencePiece), and is U+FFFD if it is a part of a
    character. A special token that ends a turn is not in the text, and has its name.
    """
    parts = (text[start:end] for start, end in offsets)
    return [part or (piece if REPLACEMENT not in piece else "") for part, piece in zip(parts, pieces, strict=True)]
