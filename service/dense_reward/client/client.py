"""The clients of the service: a synchronous one, and an asynchronous one with the same methods.

Requests are built in requests.py, answers are parsed in responses.py, and http.py decides when to retry; both clients
share them. Needs only httpx2, numpy and pydantic.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import httpx2
import numpy as np
from numpy.typing import NDArray

from dense_reward.client import requests
from dense_reward.client.http import LIMITS, Backoff, Failure, Patience, http_settings, refusal, unreachable
from dense_reward.client.requests import DEFAULTS, Call, Ids, ItemToScore, ScoreOptions
from dense_reward.client.responses import parse_cards, parse_scored
from dense_reward.client.results import FloatArrayName, Scored, padded
from dense_reward.client.tokenizer import CallersTokenizer, agreed_sha256, card_named
from dense_reward.schemas import ModelCard
from dense_reward.text.special_tokens import JsonValue, Message

if TYPE_CHECKING:
    import torch

CandidateIds = Sequence[Sequence[Sequence[int]] | NDArray[np.integer]] | NDArray[np.integer]
Segments = Sequence[Sequence[tuple[int, int]]]
BACKOFF = Backoff()


class Client:
    """A synchronous client, which threads can share. It is a context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 60.0,
        retry_for_s: float = 120.0,
        encoding: requests.Encoding = "base64",
        api_key: str | None = None,
        backoff: Backoff = BACKOFF,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Does not connect yet. Raises ValueError for an invalid address or time.

        `timeout_s` limits each wait for the service (to connect, or for the next bytes of an answer). No attempt starts
        later than `retry_for_s` after the first one. `encoding`: how the service sends arrays.
        """
        http = http_settings(base_url, timeout_s, retry_for_s, api_key)
        self._http = httpx2.Client(
            base_url=http.url, headers=http.headers, timeout=http.timeout, limits=LIMITS, transport=transport
        )
        self._retry_for_s = retry_for_s
        self._encoding = encoding
        self._backoff = backoff

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_arguments: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def score(
        self,
        *,
        prompt: str,
        response: str | None = None,
        responses: Sequence[str] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """Rewards of one response, or of several to one prompt. The service renders and tokenises them."""
        item = requests.one_item(prompt=prompt, response=response, responses=responses)
        return self._score(requests.score_one(item, options, self._encoding))

    def score_ids(
        self,
        prompt_ids: Ids,
        response_ids: Sequence[Ids] | NDArray[np.integer],
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """Rewards of exact ids [G][T]: one for each id of each response. The answer always includes token_ids."""
        item = requests.one_item(
            prompt_ids=prompt_ids, response_ids=response_ids, candidate_ids=candidate_ids, segments=segments
        )
        return self._score(requests.score_one(item, options, self._encoding))

    def score_stream(
        self,
        token_ids: Ids,
        score_mask: Ids | NDArray[np.bool_],
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """Rewards of the tokens of one multi-turn stream whose `score_mask` is 1, in one result."""
        item = requests.one_item(
            token_ids=token_ids, score_mask=score_mask, candidate_ids=candidate_ids, segments=segments
        )
        return self._score(requests.score_one(item, options, self._encoding))

    def score_messages(
        self,
        messages: Sequence[Message],
        *,
        score: Literal["last", "all_assistant"] = "last",
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """Rewards of the assistant's last message of a chat, or of all its messages in one result."""
        item = requests.one_item(messages=messages, score=score, tools=tools, template_kwargs=template_kwargs)
        return self._score(requests.score_one(item, options, self._encoding))

    def score_text(self, text: str, *, options: ScoreOptions = DEFAULTS) -> Scored:
        """Rewards of every token of a text except the first."""
        return self._score(requests.score_one({"text": text}, options, self._encoding))

    def score_items(
        self, items: Sequence[ItemToScore], *, on_error: requests.OnError = "fail", options: ScoreOptions = DEFAULTS
    ) -> Scored:
        """Rewards of items of any form (see schemas.Item). With `on_error` "per_item", a bad item gets an error."""
        return self._score(requests.score_many(items, options, self._encoding, on_error))

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
        return self._send(requests.heatmap(items, options, format, palette, compare)).text

    def models(self) -> tuple[ModelCard, ...]:
        """The cards of the served pairs."""
        return parse_cards(self._send(requests.MODELS).content)

    def ready(self) -> bool:
        """Whether the service can score now. Does not retry."""
        return not isinstance(self._attempt(requests.READY), Failure)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the service can score. Raises ServiceUnavailableError after `timeout_s`."""
        self._send(requests.READY, timeout_s)

    def check_tokenizer(self, tokenizer: CallersTokenizer, model: str | None = None) -> str:
        """The tokenizer_sha256 of caller and service, for ScoreOptions.

        Raises TokenizerMismatchError if they differ, ValueError if `model` does not name exactly one pair.
        """
        return agreed_sha256(tokenizer, card_named(self.models(), model))

    @staticmethod
    def to_torch(scored: Scored, name: FloatArrayName = "reward") -> "tuple[torch.Tensor, torch.Tensor]":
        """See the function to_torch."""
        return to_torch(scored, name)

    def _score(self, score_call: requests.ScoreCall) -> Scored:
        return parse_scored(self._send(score_call.call).content, score_call.expectation)

    def _send(self, call: Call, retry_for_s: float | None = None) -> httpx2.Response:
        limit_s = self._retry_for_s if retry_for_s is None else retry_for_s
        patience = Patience(self._backoff, limit_s, started_s=time.monotonic())
        while isinstance(outcome := self._attempt(call), Failure):
            time.sleep(patience.delay_s(outcome, time.monotonic(), random.random()))
        return outcome

    def _attempt(self, call: Call) -> httpx2.Response | Failure:
        try:
            response = self._http.request(call.method, call.path, content=call.body, headers=call.headers)
        except httpx2.TransportError as error:
            return unreachable(error)
        failure = refusal(response)
        return response if failure is None else failure


class AsyncClient:
    """An asynchronous client, which belongs to one event loop. It is an asynchronous context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 60.0,
        retry_for_s: float = 120.0,
        encoding: requests.Encoding = "base64",
        api_key: str | None = None,
        backoff: Backoff = BACKOFF,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """See Client."""
        http = http_settings(base_url, timeout_s, retry_for_s, api_key)
        self._http = httpx2.AsyncClient(
            base_url=http.url, headers=http.headers, timeout=http.timeout, limits=LIMITS, transport=transport
        )
        self._retry_for_s = retry_for_s
        self._encoding = encoding
        self._backoff = backoff

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_arguments: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def score(
        self,
        *,
        prompt: str,
        response: str | None = None,
        responses: Sequence[str] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """See Client.score."""
        item = requests.one_item(prompt=prompt, response=response, responses=responses)
        return await self._score(requests.score_one(item, options, self._encoding))

    async def score_ids(
        self,
        prompt_ids: Ids,
        response_ids: Sequence[Ids] | NDArray[np.integer],
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """See Client.score_ids."""
        item = requests.one_item(
            prompt_ids=prompt_ids, response_ids=response_ids, candidate_ids=candidate_ids, segments=segments
        )
        return await self._score(requests.score_one(item, options, self._encoding))

    async def score_stream(
        self,
        token_ids: Ids,
        score_mask: Ids | NDArray[np.bool_],
        *,
        candidate_ids: CandidateIds | None = None,
        segments: Segments | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """See Client.score_stream."""
        item = requests.one_item(
            token_ids=token_ids, score_mask=score_mask, candidate_ids=candidate_ids, segments=segments
        )
        return await self._score(requests.score_one(item, options, self._encoding))

    async def score_messages(
        self,
        messages: Sequence[Message],
        *,
        score: Literal["last", "all_assistant"] = "last",
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        options: ScoreOptions = DEFAULTS,
    ) -> Scored:
        """See Client.score_messages."""
        item = requests.one_item(messages=messages, score=score, tools=tools, template_kwargs=template_kwargs)
        return await self._score(requests.score_one(item, options, self._encoding))

    async def score_text(self, text: str, *, options: ScoreOptions = DEFAULTS) -> Scored:
        """See Client.score_text."""
        return await self._score(requests.score_one({"text": text}, options, self._encoding))

    async def score_items(
        self, items: Sequence[ItemToScore], *, on_error: requests.OnError = "fail", options: ScoreOptions = DEFAULTS
    ) -> Scored:
        """See Client.score_items."""
        return await self._score(requests.score_many(items, options, self._encoding, on_error))

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
        return (await self._send(requests.heatmap(items, options, format, palette, compare))).text

    async def models(self) -> tuple[ModelCard, ...]:
        """See Client.models."""
        return parse_cards((await self._send(requests.MODELS)).content)

    async def ready(self) -> bool:
        """See Client.ready."""
        return not isinstance(await self._attempt(requests.READY), Failure)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See Client.wait_until_ready."""
        await self._send(requests.READY, timeout_s)

    async def check_tokenizer(self, tokenizer: CallersTokenizer, model: str | None = None) -> str:
        """See Client.check_tokenizer."""
        return agreed_sha256(tokenizer, card_named(await self.models(), model))

    @staticmethod
    def to_torch(scored: Scored, name: FloatArrayName = "reward") -> "tuple[torch.Tensor, torch.Tensor]":
        """See the function to_torch."""
        return to_torch(scored, name)

    async def _score(self, score_call: requests.ScoreCall) -> Scored:
        return parse_scored((await self._send(score_call.call)).content, score_call.expectation)

    async def _send(self, call: Call, retry_for_s: float | None = None) -> httpx2.Response:
        limit_s = self._retry_for_s if retry_for_s is None else retry_for_s
        patience = Patience(self._backoff, limit_s, started_s=time.monotonic())
        while isinstance(outcome := await self._attempt(call), Failure):
            await asyncio.sleep(patience.delay_s(outcome, time.monotonic(), random.random()))
        return outcome

    async def _attempt(self, call: Call) -> httpx2.Response | Failure:
        try:
            response = await self._http.request(call.method, call.path, content=call.body, headers=call.headers)
        except httpx2.TransportError as error:
            return unreachable(error)
        failure = refusal(response)
        return response if failure is None else failure


def to_torch(scored: Scored, name: FloatArrayName = "reward") -> "tuple[torch.Tensor, torch.Tensor]":
    """float32 [G, T], zero after each response's end, and the bool mask [G, T] of its tokens, on the CPU.

    Raises ValueError if a response failed, or was answered without this array.
    """
    import torch  # noqa: PLC0415 - a caller that uses only numpy needs no torch

    values_GT, mask_GT = padded(scored, name)
    return torch.from_numpy(values_GT), torch.from_numpy(mask_GT)
