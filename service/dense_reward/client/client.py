"""The clients of the service: a synchronous one, and an asynchronous one with the same methods.

What they do is in base.py, many.py, requests.py, responses.py and http.py; here is only how each of them waits. Needs
only httpx2, numpy and pydantic.
"""

import asyncio
import random
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any, Self

import httpx2

from dense_reward.answers import answer_within, read_all
from dense_reward.bounded_connections import answered_within, bounded
from dense_reward.client import requests
from dense_reward.client.base import ClientSettings, ScoringClient, request_of
from dense_reward.client.errors import ClientError
from dense_reward.client.http import LIMITS, Backoff, Failure, HttpSettings, Tries, unreachable
from dense_reward.client.many import Group, Many, Outcome
from dense_reward.client.progress import Bar, bar
from dense_reward.client.requests import DEFAULTS, Call, ItemToScore, OnError, ScoreOptions
from dense_reward.client.responses import parse_cards, parse_scored
from dense_reward.client.results import Scored, ScoredItem
from dense_reward.client.routes import Route, Routes
from dense_reward.client.tokenizer import CallersTokenizer, agreed_sha256, card_named
from dense_reward.schemas import ModelCard
from dense_reward.waits import CLIENT_RETRY_FOR_S, CLIENT_TIMEOUT_S

BACKOFF = Backoff()
# What can become of a request in score_many, instead of an answer.
ERRORS = (ClientError, TypeError, ValueError, httpx2.TransportError)


class Client(ScoringClient[Scored, httpx2.Client]):
    """A synchronous client, which threads can share. It is a context manager, and can be pickled."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = CLIENT_TIMEOUT_S,
        retry_for_s: float = CLIENT_RETRY_FOR_S,
        encoding: requests.Encoding = "base64",
        api_key: str | None = None,
        backoff: Backoff = BACKOFF,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Does not connect yet. Raises ValueError for an invalid address or time.

        `timeout_s` limits the time of one answer, until its last byte; a connection must succeed within 10 s.
        No attempt starts later than `retry_for_s` after the first one. `encoding`: how the service sends arrays.

        Retries are logged in `dense_reward.client`: a warning after 2 s, and a line (info) when the service answers
        again. Not retried: an invalid certificate, and a host name that has no address and never had one.
        """
        super().__init__(ClientSettings(base_url, timeout_s, retry_for_s, encoding, api_key, backoff), transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_arguments: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        if self._open is not None:
            self._open.close()

    def score_many(
        self,
        items: Iterable[ItemToScore],
        *,
        urls: Sequence[str] | None = None,
        options: ScoreOptions = DEFAULTS,
        on_error: OnError = "fail",
        request_tokens: int = 4096,
        in_flight: int = 32,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Generator[ScoredItem, None, None]:
        """Rewards of any number of items, in their order, each exactly once: one call keeps the services busy.

        `items` is read lazily, and results are yielded as soon as it is their turn, so memory is bounded. `urls`: base
        URLs of all services to use, which serve the same pair; None: that of this client. Items with equal prompts go
        to the same service; if it fails or refuses, to the others until it answers again. `request_tokens`: about how
        many tokens a request has (four characters count as one). `in_flight`: most requests in flight per service; how
        many pay is found while it runs. `progress`: a bar on standard error; None: if that is a terminal and tqdm is
        installed. `total`: the number of items, for the bar.

        With `on_error` "per_item", a bad item is yielded with its error; with "fail" it raises ScoringError with its
        index once all items before it were yielded. Raises ServiceUnavailableError if nothing was answered for
        `retry_for_s`, MismatchError if an answer comes from another revision or tokenizer than the first one.
        """
        many, routes = self._many(urls, options, on_error, request_tokens, in_flight)
        return self._run(iter(items), many, routes, bar(progress, total))

    def heatmap(
        self,
        items: Sequence[ItemToScore],
        *,
        format: requests.HeatmapFormat = "html",
        compare: bool = True,
        palette: str | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> str:
        """A heatmap of the rewards of a batch of items. `compare`: one colour scale for all responses."""
        call = requests.heatmap(items, self._pins.applied(options), format, palette, compare)
        return self._send(call, self._patience()).text

    def models(self) -> tuple[ModelCard, ...]:
        """The cards of the served pairs."""
        return parse_cards(self._send(requests.MODELS, self._patience()).content)

    def ready(self) -> bool:
        """Whether the service can score now. Does not retry."""
        return not isinstance(self._attempt(requests.READY, self._settings.base_url), Failure)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the service can score. Raises ServiceUnavailableError after `timeout_s`."""
        self._send(requests.READY, self._patience(timeout_s))

    def check_tokenizer(self, tokenizer: CallersTokenizer, model: str | None = None) -> str:
        """The tokenizer_sha256 of caller and service, if they are equal. Pins the pair for all later calls (see `pin`).

        Raises TokenizerMismatchError if they differ, ValueError if `model` does not name exactly one pair.
        """
        cards = self.models()
        card = card_named(cards, model)
        sha256 = agreed_sha256(tokenizer, card)
        self._pins.pin_one_of(card, cards)
        return sha256

    def _connect(self, http: HttpSettings) -> httpx2.Client:
        transport = self._transport
        assert transport is None or isinstance(transport, httpx2.BaseTransport)
        return bounded(httpx2.Client(headers=http.headers, timeout=http.timeout, limits=LIMITS, transport=transport))

    def _score(self, score_call: requests.ScoreCall) -> Scored:
        return parse_scored(self._send(score_call.call, self._patience()).content, score_call.expectation)

    def _send(self, call: Call, tries: Tries, pause: Callable[[float], None] = time.sleep) -> httpx2.Response:
        pause(tries.first_delay_s(time.monotonic()))
        while isinstance(outcome := self._attempt(call, tries.url), Failure):
            pause(self._failed(tries, outcome, random.random()))
        tries.answered()
        return outcome

    def _attempt(self, call: Call, url: str) -> httpx2.Response | Failure:
        connection, timeout_s = self._connection(), self._settings.timeout_s
        request = request_of(connection, call, url)
        try:
            with answered_within(timeout_s, request), closing(connection.send(request, stream=True)) as arriving:
                response = read_all(arriving, timeout_s)
        except httpx2.TransportError as error:
            return unreachable(error)
        return self._outcome_of(url, response)

    def _run(
        self, items: Iterator[ItemToScore], many: Many, routes: Routes, shown: Bar
    ) -> Generator[ScoredItem, None, None]:
        stopped = threading.Event()
        pool = ThreadPoolExecutor(many.in_flight.most, thread_name_prefix="score_many")
        running: set[Future[Outcome]] = set()
        try:
            while not many.finished(len(running)):
                while group := self._next_group(many, items, len(running)):
                    running.add(pool.submit(self._outcome, group, many, routes, stopped))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    many.finish(future.result())
                while found := many.results():
                    shown.show(found)
                    yield from found
        finally:
            stopped.set()
            shown.close()
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _next_group(many: Many, items: Iterator[ItemToScore], running: int) -> Group | None:
        while many.wants_item():
            try:
                many.take(next(items))
            except StopIteration:
                many.end()
        return many.next_group(running)

    def _outcome(self, group: Group, many: Many, routes: Routes, stopped: threading.Event) -> Outcome:
        def pause(seconds: float) -> None:
            if stopped.wait(seconds) if seconds else stopped.is_set():
                raise CancelledError

        began_s, route = time.monotonic(), Route(routes, group.order)
        answer: Scored | Exception
        try:
            call = many.plan.call(group)
            answer = parse_scored(self._send(call.call, route, pause).content, call.expectation)
        except ERRORS as error:
            answer = error
        return Outcome(group, answer, time.monotonic() - began_s, route.failures)


class AsyncClient(ScoringClient[Coroutine[Any, Any, Scored], httpx2.AsyncClient]):
    """An asynchronous client, for one event loop at a time. An asynchronous context manager; can be pickled."""

    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = CLIENT_TIMEOUT_S,
        retry_for_s: float = CLIENT_RETRY_FOR_S,
        encoding: requests.Encoding = "base64",
        api_key: str | None = None,
        backoff: Backoff = BACKOFF,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """See Client."""
        super().__init__(ClientSettings(base_url, timeout_s, retry_for_s, encoding, api_key, backoff), transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_arguments: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        if self._open is not None:
            await self._open.aclose()

    def score_many(
        self,
        items: Iterable[ItemToScore] | AsyncIterable[ItemToScore],
        *,
        urls: Sequence[str] | None = None,
        options: ScoreOptions = DEFAULTS,
        on_error: OnError = "fail",
        request_tokens: int = 4096,
        in_flight: int = 32,
        progress: bool | None = None,
        total: int | None = None,
    ) -> AsyncGenerator[ScoredItem, None]:
        """See Client.score_many. `items` can also be asynchronous."""
        many, routes = self._many(urls, options, on_error, request_tokens, in_flight)
        return self._run(_one_by_one(items), many, routes, bar(progress, total))

    async def heatmap(
        self,
        items: Sequence[ItemToScore],
        *,
        format: requests.HeatmapFormat = "html",
        compare: bool = True,
        palette: str | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> str:
        """See Client.heatmap."""
        call = requests.heatmap(items, self._pins.applied(options), format, palette, compare)
        return (await self._send(call, self._patience())).text

    async def models(self) -> tuple[ModelCard, ...]:
        """See Client.models."""
        return parse_cards((await self._send(requests.MODELS, self._patience())).content)

    async def ready(self) -> bool:
        """See Client.ready."""
        return not isinstance(await self._attempt(requests.READY, self._settings.base_url), Failure)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See Client.wait_until_ready."""
        await self._send(requests.READY, self._patience(timeout_s))

    async def check_tokenizer(self, tokenizer: CallersTokenizer, model: str | None = None) -> str:
        """See Client.check_tokenizer."""
        cards = await self.models()
        card = card_named(cards, model)
        sha256 = agreed_sha256(tokenizer, card)
        self._pins.pin_one_of(card, cards)
        return sha256

    def _connect(self, http: HttpSettings) -> httpx2.AsyncClient:
        transport = self._transport
        assert transport is None or isinstance(transport, httpx2.AsyncBaseTransport)
        self._loop = asyncio.get_running_loop()
        return httpx2.AsyncClient(headers=http.headers, timeout=http.timeout, limits=LIMITS, transport=transport)

    def _is_stale(self) -> bool:
        """After asyncio.run, its loop is closed; the next one gets connections of its own. Raises RuntimeError."""
        if self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
            raise RuntimeError("another event loop uses this client: make one for each loop")
        return self._loop.is_closed()

    async def _score(self, score_call: requests.ScoreCall) -> Scored:
        return parse_scored((await self._send(score_call.call, self._patience())).content, score_call.expectation)

    async def _send(self, call: Call, tries: Tries) -> httpx2.Response:
        await asyncio.sleep(tries.first_delay_s(time.monotonic()))
        while isinstance(outcome := await self._attempt(call, tries.url), Failure):
            await asyncio.sleep(self._failed(tries, outcome, random.random()))
        tries.answered()
        return outcome

    async def _attempt(self, call: Call, url: str) -> httpx2.Response | Failure:
        connection = self._connection()
        try:
            response = await answer_within(self._settings.timeout_s, connection, request_of(connection, call, url))
        except httpx2.TransportError as error:
            return unreachable(error)
        return self._outcome_of(url, response)

    async def _run(
        self, items: AsyncIterator[ItemToScore], many: Many, routes: Routes, shown: Bar
    ) -> AsyncGenerator[ScoredItem, None]:
        running: set[asyncio.Task[Outcome]] = set()
        try:
            while not many.finished(len(running)):
                while group := await self._next_group(many, items, len(running)):
                    running.add(asyncio.create_task(self._outcome(group, many, routes)))
                if running:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        many.finish(task.result())
                while found := many.results():
                    shown.show(found)
                    for item in found:
                        yield item
        finally:
            shown.close()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    @staticmethod
    async def _next_group(many: Many, items: AsyncIterator[ItemToScore], running: int) -> Group | None:
        while many.wants_item():
            try:
                many.take(await anext(items))
            except StopAsyncIteration:
                many.end()
        return many.next_group(running)

    async def _outcome(self, group: Group, many: Many, routes: Routes) -> Outcome:
        began_s, route = time.monotonic(), Route(routes, group.order)
        answer: Scored | Exception
        try:
            call = many.plan.call(group)
            answer = parse_scored((await self._send(call.call, route)).content, call.expectation)
        except ERRORS as error:
            answer = error
        return Outcome(group, answer, time.monotonic() - began_s, route.failures)


async def _one_by_one(items: Iterable[ItemToScore] | AsyncIterable[ItemToScore]) -> AsyncIterator[ItemToScore]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
