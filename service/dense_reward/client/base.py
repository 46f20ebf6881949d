"""What the two clients share: settings, pins, pickling, and the methods that score.

A scoring method builds a request and hands it to `_score`, which returns a result in the synchronous client and a
coroutine in the asynchronous one. So each method is written once.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray

from dense_reward.client import requests
from dense_reward.client.http import (
    Backoff,
    Failure,
    HttpSettings,
    Patience,
    Tries,
    http_settings,
    no_such_host,
    refusal,
)
from dense_reward.client.ids import item_of
from dense_reward.client.many import Many, Plan
from dense_reward.client.pictures import FloatArrayName
from dense_reward.client.progress import RetryLog
from dense_reward.client.requests import DEFAULTS, Call, Encoding, ItemToScore, OnError, ScoreOptions
from dense_reward.client.results import Scored
from dense_reward.client.routes import Routes
from dense_reward.client.tables import to_torch
from dense_reward.client.tokenizer import Pins
from dense_reward.schemas import ModelCard
from dense_reward.text.special_tokens import JsonValue, Message

if TYPE_CHECKING:
    import torch

CandidateIds = Sequence[Sequence[Sequence[int]] | NDArray[np.integer]] | NDArray[np.integer]
Segments = Sequence[Sequence[tuple[int, int]]]
# Scored, or a coroutine that returns it.
Answer_co = TypeVar("Answer_co", covariant=True)
Connection = TypeVar("Connection", httpx2.Client, httpx2.AsyncClient)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The arguments of a client, which a pickled client carries along."""

    base_url: str
    timeout_s: float
    retry_for_s: float
    encoding: Encoding
    api_key: str | None = field(repr=False)
    backoff: Backoff

    def http(self) -> HttpSettings:
        """Raises ValueError for an invalid address or time."""
        return http_settings(self.base_url, self.timeout_s, self.retry_for_s, self.api_key)


class ScoringClient(ABC, Generic[Answer_co, Connection]):
    """The part of a client that does not depend on how it waits."""

    _open: Connection | None
    _process: int
    _closed: bool
    _lock: threading.Lock
    _log: RetryLog
    _reached: set[str]
    _answered: set[str]

    def __init__(self, settings: ClientSettings, transport: object | None) -> None:
        settings.http()
        self._settings = settings
        self._transport = transport
        self._pins = Pins()
        self._begin()

    def score(
        self,
        *,
        prompt: str,
        response: str | None = None,
        responses: Sequence[str] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Answer_co:
        """Rewards of one response, or of several to one prompt. The service renders and tokenises them."""
        return self._one(requests.one_item(prompt=prompt, response=response, responses=responses), options)

    def score_ids(
        self,
        prompt_ids: requests.AnyIds,
        response_ids: requests.AnyIds,
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Answer_co:
        """Rewards of exact ids [G][T]: one for each id of each response. The answer always includes token_ids.

        Takes lists, arrays, tensors and the output of a tokenizer, whose padding is removed. A flat list [T] is one
        response. Raises TypeError or ValueError that says what to pass.
        """
        item = requests.one_item(
            prompt_ids=prompt_ids, response_ids=response_ids, candidate_ids=candidate_ids, segments=segments
        )
        return self._one(item, options)

    def score_stream(
        self,
        token_ids: requests.AnyIds,
        score_mask: requests.Ids | NDArray[np.bool_],
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Answer_co:
        """Rewards of the tokens of one multi-turn stream whose `score_mask` is 1, in one result."""
        item = requests.one_item(
            token_ids=token_ids, score_mask=score_mask, candidate_ids=candidate_ids, segments=segments
        )
        return self._one(item, options)

    def score_messages(
        self,
        messages: Sequence[Message],
        *,
        score: Literal["last", "all_assistant"] = "last",
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Answer_co:
        """Rewards of the assistant's last message of a chat, or of all its messages in one result."""
        item = requests.one_item(messages=messages, score=score, tools=tools, template_kwargs=template_kwargs)
        return self._one(item, options)

    def score_text(self, text: str, *, options: ScoreOptions = DEFAULTS) -> Answer_co:
        """Rewards of every token of a text except the first."""
        return self._one({"text": text}, options)

    def score_items(
        self, items: Sequence[ItemToScore], *, on_error: OnError = "fail", options: ScoreOptions = DEFAULTS
    ) -> Answer_co:
        """Rewards of items of any form (see schemas.Item), in one request: `score_many` sends any number of items.

        With `on_error` "per_item", a bad item gets an error.
        """
        plain = [item_of(item) for item in items]
        return self._score(requests.score_many(plain, self._pins.applied(options), self._settings.encoding, on_error))

    def pin(self, card: ModelCard, *, also_unnamed: bool = False) -> None:
        """Pins this pair: later requests to it name its tokenizer and revision, and the service refuses them (409,
        MismatchError) if it serves something else. `also_unnamed`: requests without `model` go to this pair too.
        """
        self._pins.pin(card, also_unnamed=also_unnamed)

    def unpin(self, model: str | None = None) -> None:
        """Forgets what `pin` or `check_tokenizer` pinned for this pair; None: for all. Call either again to repin."""
        self._pins.unpin(model)

    @staticmethod
    def to_torch(scored: Scored, name: FloatArrayName = "reward") -> "tuple[torch.Tensor, torch.Tensor]":
        """See the function to_torch."""
        return to_torch(scored, name)

    @abstractmethod
    def _score(self, score_call: requests.ScoreCall) -> Answer_co: ...

    @abstractmethod
    def _connect(self, http: HttpSettings) -> Connection: ...

    def _one(self, item: ItemToScore, options: ScoreOptions) -> Answer_co:
        pinned = self._pins.applied(options)
        return self._score(requests.score_one(item_of(item), pinned, self._settings.encoding))

    def _patience(self, retry_for_s: float | None = None) -> Patience:
        settings = self._settings
        limit_s = settings.retry_for_s if retry_for_s is None else retry_for_s
        return Patience(settings.backoff, limit_s, time.monotonic(), url=settings.base_url)

    def _many(
        self, urls: Sequence[str] | None, options: ScoreOptions, on_error: OnError, request_tokens: int, in_flight: int
    ) -> tuple[Many, Routes]:
        """Raises ValueError for an invalid argument of `score_many`."""
        settings = self._settings
        chosen = [settings.base_url] if urls is None else list(dict.fromkeys(urls))
        if isinstance(urls, str) or not chosen:
            raise ValueError(f"urls must be a list of base URLs, not {urls!r}")
        for url in chosen:
            http_settings(url, settings.timeout_s, settings.retry_for_s, None)
        plan = Plan(self._pins.applied(options), settings.encoding, on_error, request_tokens, in_flight)
        routes = Routes(chosen, settings.backoff, settings.retry_for_s)
        return Many(plan, routes, settings.timeout_s), routes

    def _outcome_of(self, url: str, response: httpx2.Response) -> httpx2.Response | Failure:
        self._reached.add(url)
        failure = refusal(response, has_answered=url in self._answered)
        if failure is not None:
            return failure
        self._answered.add(url)
        self._log.answered(url, time.monotonic())
        return response

    def _failed(self, tries: Tries, failure: Failure, jitter: float) -> float:
        """Seconds to wait before the next attempt. Raises ServiceUnavailableError if there is none."""
        url, now_s = tries.url, time.monotonic()
        if failure.unnamed and url not in self._reached:
            raise no_such_host(failure)
        delay_s = tries.delay_s(failure, now_s, jitter)
        self._log.failed(url, failure.error, now_s, delay_s, tries.limit_s)
        return delay_s

    def _connection(self) -> Connection:
        """Connections are opened in the process that uses them: a process that was forked must not share them."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this client is closed: make another one")
            if self._open is None or self._process != os.getpid() or self._is_stale():
                self._open, self._process = self._connect(self._settings.http()), os.getpid()
            return self._open

    def _is_stale(self) -> bool:
        """Whether the open connections can never be used again."""
        return False

    def _begin(self) -> None:
        self._open = None
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._log = RetryLog()
        self._reached = set()
        self._answered = set()

    def __getstate__(self) -> tuple[ClientSettings, Pins]:
        if self._transport is not None:
            raise TypeError("a client with its own transport cannot be pickled: make one in each process")
        return self._settings, self._pins

    def __setstate__(self, state: tuple[ClientSettings, Pins]) -> None:
        self._settings, self._pins = state
        self._transport = None
        self._begin()


def request_of(connection: Connection, call: Call, url: str) -> httpx2.Request:
    """The HTTP request of a call to the service at `url`."""
    return connection.build_request(call.method, url.rstrip("/") + call.path, content=call.body, headers=call.headers)
