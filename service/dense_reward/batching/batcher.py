"""Waiting requests -> batches for the device. One event loop, one device thread, a queue bounded in tokens. No torch.

While one batch is computed the next one fills, and once it is full a second thread prepares it: there is no polling and
no timer. Requests take turns, so that a short one does not wait for the whole of a long one. Every waiter gets an
answer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dense_reward.batching.admission import Admission
from dense_reward.batching.deduplicate import Ask, prepare_together
from dense_reward.batching.scheduler import Job, Member, Scheduler, Terms, halved, tokens_together, units_of
from dense_reward.errors import (
    RETRY_UNAVAILABLE_S,
    EngineLostError,
    LoadingStoppedError,
    OutOfMemoryError,
    SequenceError,
    refuse,
)
from dense_reward.records import Engine, Result, Scores, TokenScores, Trunk, Wants, Work
from dense_reward.telemetry.metrics import Metrics

INTERACTIVE = Terms()
Number = TypeVar("Number", np.float32, np.int32)


@dataclass(frozen=True, slots=True)
class Computed:
    """Scores per trunk and branch, with the seconds that the request waited and was computed (its batches whole)."""

    scores: Scores
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class _Batch:
    """Units that are computed together; `ahead` is their preparation where it began while the device was busy.

    Nothing else may name a preparation: one that failed has, by its traceback, tensors of the batch.
    """

    members: list[Member]
    ahead: "asyncio.Future[Work] | None" = None

    @property
    def trunks(self) -> list[Trunk]:
        return [unit.trunk for _, unit in self.members]

    def drop_gone(self) -> bool:
        """Leave out units whose caller left, or that failed with another part of their request; whether there were."""
        before = len(self.members)
        self.members = [(job, unit) for job, unit in self.members if not job.done.done()]
        return len(self.members) < before

    def forget_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.cancel()  # a failure too: else it would be logged as one that nobody heard of
            self.ahead = None


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why a batch is to be computed in parts: there was no memory for it, or one of its sequences is at fault."""

    reason: str
    for_memory: bool


class Batcher:
    """Feeds one device from one thread, for all pairs on it.

    `run` is the loop, `submit` waits for an answer, `close` ends the loop.
    """

    def __init__(self, metrics: Metrics, *, max_batch_tokens: int, max_queue_tokens: int) -> None:
        self.admission = Admission(max_queue_tokens)
        self._metrics = metrics
        self._max_batch_tokens = max_batch_tokens
        self._waiting = Scheduler(max_batch_tokens)
        self._unanswered: set[Job] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._next: _Batch | None = None
        self._device_busy = False
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._host = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def on_device(self, call: Callable[[], Result]) -> Result:
        """What a call on the device's thread gives, between two batches. For threads other than the event loop's.

        Raises LoadingStoppedError once the queue has ended.
        """
        try:
            future = self._device.submit(call)
        except RuntimeError:
            raise LoadingStoppedError from None
        return future.result()

    async def submit(
        self, engine: Engine, trunks: Sequence[Trunk], wants: Wants, terms: Terms = INTERACTIVE
    ) -> Computed:
        """Scores of all branches by one pair. A caller that goes away takes its waiting work with it.

        Raises what the engine raises for one of its sequences, RequestError(out_of_memory) where that does not fit, and
        RequestError(draining) after close, or where `run` ends before the answer.
        """
        if self._closing:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S)
        job = self._job(engine, trunks, wants, terms)
        if job.units:
            self._waiting.add(job)
            self._unanswered.add(job)
            self._wake.set()
            self._prepare_ahead()
            try:
                await job.done
            finally:
                self._unanswered.discard(job)
                self._waiting.forget(job)
        started_at = job.queued_at if job.started_at is None else job.started_at
        return Computed(job.scores, started_at - job.queued_at, job.compute_s)

    async def run(self) -> None:
        """Compute batches until closed and empty. However it ends, nobody is let in or left waiting after that.

        Raises EngineLostError where the engine does.
        """
        try:
            await self._serve()
        finally:
            self.close()
            self._device.shutdown(wait=False)
            self._host.shutdown(wait=False)
            if self._next is not None:
                self._next.forget_ahead()
            for job in self._unanswered:
                _fail(job, refuse("draining", "the engine was lost", retry_after_s=RETRY_UNAVAILABLE_S))

    def close(self) -> None:
        """Let `run` return once the queue is empty."""
        self._closing = True
        self._wake.set()

    async def _serve(self) -> None:
        while True:
            batch, self._next = self._next, None
            if batch is not None:
                await self._compute(batch)
            elif self._waiting:
                await self._compute(_Batch(self._waiting.take()))
            elif self._closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _prepare_ahead(self) -> None:
        """Begin with the next batch while the device is busy, if it is full; one that is not may still grow."""
        if self._device_busy and self._next is None and self._waiting.fills_a_batch:
            self._next = _Batch(self._waiting.take())
            self._next.ahead = self._prepare(self._next)

    async def _compute(self, batch: _Batch) -> None:
        """Compute one batch; split it and try again where less of it may succeed."""
        failed = await self._attempt(batch)
        if failed is None:
            return
        if failed.for_memory:
            self._metrics.out_of_memory()
            # The device thread holds the failed batch's tensors until it turns to something else.
            await asyncio.get_running_loop().run_in_executor(self._device, _nothing)
        await self._compute_halves(batch.members, failed)

    async def _attempt(self, batch: _Batch) -> _Failed | None:
        """Hand out a batch's results, or its failure to each caller. Returns why, where it is to be split."""
        try:
            work = await self._work(batch)
            if work is not None:
                scores, seconds = await self._on_device(batch, work)
                _check_shape(batch.trunks, scores)
                self._hand_out(batch.members, scores, seconds)
        except (OutOfMemoryError, SequenceError) as error:  # not retried here: the traceback keeps tensors alive
            return _Failed(str(error), for_memory=isinstance(error, OutOfMemoryError))
        except Exception as error:  # whatever broke the batch, each of its callers must hear of it
            for job, _ in batch.members:
                _fail(job, error)
            if isinstance(error, EngineLostError):
                raise
        return None

    async def _work(self, batch: _Batch) -> Work | None:
        """Computes the units whose callers still wait, prepared again where one of them left; None where all did."""
        work = await self._prepared_ahead(batch)
        while batch.drop_gone() or work is None:
            if not batch.members:
                return None
            work = await self._prepare(batch)
        return work

    async def _prepared_ahead(self, batch: _Batch) -> Work | None:
        """None where it is to be prepared now: it was not yet, a caller left, or the batch before took the memory."""
        if batch.drop_gone():
            batch.forget_ahead()
        try:
            return None if batch.ahead is None else await batch.ahead
        except OutOfMemoryError:
            return None
        finally:
            batch.ahead = None

    def _prepare(self, batch: _Batch) -> "asyncio.Future[Work]":
        wants = Wants()
        for job, _ in batch.members:
            wants = wants | job.wants
        asks = [Ask(job.engine, unit.trunk, job.terms.group) for job, unit in batch.members]
        return asyncio.get_running_loop().run_in_executor(self._host, prepare_together, asks, wants)

    async def _on_device(self, batch: _Batch, work: Work) -> tuple[Scores, float]:
        """The scores and the seconds of the device; the next batch may be prepared meanwhile."""
        for job, _ in batch.members:
            job.started_at = job.started_at or time.perf_counter()
        self._device_busy = True
        try:
            self._prepare_ahead()
            return await asyncio.get_running_loop().run_in_executor(self._device, _timed, work)
        finally:
            self._device_busy = False

    def _hand_out(self, members: Sequence[Member], results: Scores, seconds: float) -> None:
        tokens = tokens_together(unit for _, unit in members)
        self.admission.measured(tokens, seconds)
        self._metrics.batch(
            tokens=tokens,
            shared_tokens=sum(unit.tokens_unshared for _, unit in members) - tokens,
            fill=tokens / self._max_batch_tokens,
            seconds=seconds,
        )
        for (job, unit), scores in zip(members, results, strict=True):
            job.scores[unit.trunk_index].extend(_wanted(score, job.wants) for score in scores)
            job.waiting -= 1
            if job.waiting == 0 and not job.done.done():
                job.done.set_result(None)
        for job in {job for job, _ in members}:
            job.compute_s += seconds

    async def _compute_halves(self, members: Sequence[Member], failed: _Failed) -> None:
        """Only a sequence that fails alone fails."""
        if len(members) > 1:
            half = len(members) // 2
            await self._compute(_Batch([*members[:half]]))
            await self._compute(_Batch([*members[half:]]))
            return
        job, unit = members[0]
        if len(unit.trunk.branches) > 1:
            job.waiting += 1
            for part in halved(unit, job.engine.cost(unit.trunk)):
                await self._compute(_Batch([(job, part)]))
            return
        if not failed.for_memory:
            _fail(job, SequenceError(failed.reason))
            return
        message = f"one sequence of {unit.trunk.tokens} tokens does not fit into device memory: {failed.reason}"
        _fail(job, refuse("out_of_memory", message))

    def _job(self, engine: Engine, trunks: Sequence[Trunk], wants: Wants, terms: Terms) -> Job:
        units = deque(
            unit
            for index, trunk in enumerate(trunks)
            for unit in units_of(index, trunk, engine.cost(trunk), self._max_batch_tokens, (engine, terms.group))
        )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return Job(engine, units, wants, terms, [[] for _ in trunks], len(units), done, time.perf_counter())


def cost_tokens(engine: Engine, trunks: Sequence[Trunk]) -> int:
    """What trunks count in the queue: the tokens that their pair computes for them, alone."""
    return sum(engine.cost(trunk).tokens for trunk in trunks)


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)


def _timed(work: Work) -> tuple[Scores, float]:
    started_at = time.perf_counter()
    return work(), time.perf_counter() - started_at


def _nothing() -> None:
    """What a thread is given so that it lets go of the work before."""


def _check_shape(trunks: Sequence[Trunk], results: Sequence[Sequence[TokenScores]]) -> None:
    """Raises RuntimeError where an engine lost or invented a branch or a token: nobody may get another's scores."""
    expected, found = [len(trunk.branches) for trunk in trunks], [len(scores) for scores in results]
    if expected != found:
        raise RuntimeError(f"the engine answered {found} branches of {expected}")
    for trunk, branches in zip(trunks, results, strict=True):
        tokens = [int(branch.scored_T.sum()) for branch in trunk.branches]
        answered = [len(scores.sft_logprob_S) for scores in branches]
        if tokens != answered:
            raise RuntimeError(f"the engine answered {answered} tokens of {tokens}")


def _wanted(scores: TokenScores, wants: Wants) -> TokenScores:
    """Without what only batch mates asked for."""
    k = wants.top_k
    return TokenScores(
        scores.sft_logprob_S,
        scores.reference_logprob_S,
        kl_S=scores.kl_S if wants.kl else None,
        entropy_S=scores.entropy_S if wants.entropy else None,
        candidate_sft_logprob_SK=scores.candidate_sft_logprob_SK,
        candidate_reference_logprob_SK=scores.candidate_reference_logprob_SK,
        top_ids_SK=_first(scores.top_ids_SK, k),
        top_sft_logprob_SK=_first(scores.top_sft_logprob_SK, k),
        top_reference_logprob_SK=_first(scores.top_reference_logprob_SK, k),
    )


def _first(array_SK: NDArray[Number] | None, k: int) -> NDArray[Number] | None:
    return None if array_SK is None or k == 0 else np.ascontiguousarray(array_SK[:, :k])
