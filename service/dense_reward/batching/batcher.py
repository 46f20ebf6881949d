"""The loop that feeds the device: takes batches from the scheduler, prepares and computes them, delivers the scores.

While the device computes one batch, the next batch fills. When that is full, a second thread prepares it. There is no
polling and no timer. Does not import torch. The invariants:

- One event loop, one device thread. All state here is read and changed only on the event loop. The device thread calls
  only prepared work (and `on_device` calls), one at a time; the host thread only prepares.
- Every waiter gets an answer: `submit` returns scores or raises. A batch's scores or failure reach each of its jobs,
  and when `run` ends, for whatever reason, all other jobs fail with `draining`. Otherwise a waiter would hold its
  permit, and thus queue capacity, for ever.
- Parts of a failed batch are tried only when nothing refers to the tensors of that batch: they need this memory. The
  traceback of its exception, its preparation and the thread that ran its work can refer to them.
- Preparing ahead takes at most one batch, and only a full one: units leave the scheduler when a batch is taken. After
  that, no shorter request can overtake them, and no request can join them.
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
from dense_reward.batching.deduplicate import ScoringTask, prepare_batch
from dense_reward.batching.scheduler import Job, Member, Scheduler, Terms, halved, tokens_together, units_of_request
from dense_reward.errors import (
    RETRY_UNAVAILABLE_S,
    EngineLostError,
    LoadingStoppedError,
    OutOfMemoryError,
    SequenceError,
    refuse,
)
from dense_reward.records import CountedWork, Engine, Result, Scores, TokenScores, Trunk, Wants, Work
from dense_reward.telemetry.metrics import Metrics

INTERACTIVE = Terms()
Number = TypeVar("Number", np.float32, np.int32)


@dataclass(frozen=True, slots=True)
class Computed:
    """The scores per trunk and branch, and where the time went.

    `queue_s`: until the request's first batch reached the device. `compute_s`: the device time of all its batches, each
    counted in full although other requests share it.
    """

    scores: Scores
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class _Batch:
    """Units that are computed together. `ahead`: their preparation, if it began while the device was busy.

    No other variable may refer to that future: if it failed, its traceback keeps tensors of the batch alive.
    """

    members: list[Member]
    ahead: "asyncio.Future[Work] | None" = None

    @property
    def trunks(self) -> list[Trunk]:
        return [unit.trunk for _, unit in self.members]

    def drop_done(self) -> bool:
        """Drop units whose request was cancelled, or failed with another batch. Returns whether there were any."""
        before = len(self.members)
        self.members = [(job, unit) for job, unit in self.members if not job.done.done()]
        return len(self.members) < before

    def cancel_ahead(self) -> None:
        if self.ahead is not None:
            # Cancel it even if it has failed: `cancel` marks the exception as retrieved, otherwise asyncio would log
            # it. A thread that is still preparing continues, and its result is dropped.
            self.ahead.cancel()
            self.ahead = None


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why a batch must be computed in parts: it did not fit into memory, or the engine failed on one of its sequences.

    Holds the message, not the exception: an exception would keep the batch's tensors alive.
    """

    reason: str
    for_memory: bool


class Batcher:
    """Feeds one device from one thread, for all pairs on it.

    `run` is the loop, `submit` queues a request and returns its scores, `close` lets the loop end.
    """

    def __init__(self, metrics: Metrics, *, max_batch_tokens: int, max_queue_tokens: int) -> None:
        self.admission = Admission(max_queue_tokens)
        self._metrics = metrics
        self._max_batch_tokens = max_batch_tokens
        self._scheduler = Scheduler(max_batch_tokens)
        self._unanswered: set[Job] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._next: _Batch | None = None
        self._device_busy = False
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._host = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def on_device(self, call: Callable[[], Result]) -> Result:
        """Return the result of a call on the device thread, where it runs between two batches.

        It blocks, so it must not be called on the event loop. Raises LoadingStoppedError once `run` has ended.
        """
        try:
            future = self._device.submit(call)
        except RuntimeError:
            raise LoadingStoppedError from None
        return future.result()

    async def submit(
        self, engine: Engine, trunks: Sequence[Trunk], wants: Wants, terms: Terms = INTERACTIVE
    ) -> Computed:
        """Score all branches with one pair. If the caller is cancelled, its waiting units leave the queue.

        Raises SequenceError for a sequence that the engine cannot compute, RequestError(out_of_memory) for one that
        does not fit alone, RequestError(draining) after `close` or if `run` ends first, and otherwise the error of its
        batch.
        """
        if self._closing:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S)
        job = self._job(engine, trunks, wants, terms)
        if job.units:
            self._scheduler.add(job)
            self._unanswered.add(job)
            self._wake.set()
            self._prepare_ahead()
            try:
                await job.done
            finally:
                self._unanswered.discard(job)
                self._scheduler.forget(job)
        started_at = job.queued_at if job.started_at is None else job.started_at
        return Computed(job.scores, started_at - job.queued_at, job.compute_s)

    async def run(self) -> None:
        """Compute batches until closed and empty. After it ends, for any reason, no request is admitted or waits.

        Raises EngineLostError if the engine raises it.
        """
        try:
            await self._serve()
        finally:
            self.close()
            self._device.shutdown(wait=False)
            self._host.shutdown(wait=False)
            if self._next is not None:
                self._next.cancel_ahead()
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
            elif self._scheduler:
                await self._compute(_Batch(self._scheduler.take()))
            elif self._closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _prepare_ahead(self) -> None:
        """Take and prepare the next batch while the device is busy, if it is full: otherwise it can still grow.

        If preparation fails, the error is raised when that batch is computed, so that it reaches only its own jobs.
        """
        if self._device_busy and self._next is None and self._scheduler.fills_a_batch:
            self._next = _Batch(self._scheduler.take())
            self._next.ahead = self._prepare(self._next)

    async def _compute(self, batch: _Batch) -> None:
        """Compute one batch. If a part of it might succeed, compute its halves."""
        failed = await self._attempt(batch)
        if failed is None:
            return
        if failed.for_memory:
            self._metrics.out_of_memory()
            # The exception can arrive here before the device thread has dropped the failed work and its tensors. After
            # another call it has dropped them. The host thread needs no such call: it prepares the halves.
            await asyncio.get_running_loop().run_in_executor(self._device, _no_work)
        await self._compute_halves(batch.members, failed)

    async def _attempt(self, batch: _Batch) -> _Failed | None:
        """Deliver a batch's scores, or its failure, to each job. Returns why if the batch must be split instead."""
        try:
            work = await self._prepared(batch)
            if work is not None:
                scores, seconds = await self._run_on_device(batch, work)
                _check_shape(batch.trunks, scores)
                self._deliver(batch.members, scores, seconds, work)
        except (OutOfMemoryError, SequenceError) as error:
            # The retry is outside this block: inside it, the traceback would keep the batch's tensors alive.
            return _Failed(str(error), for_memory=isinstance(error, OutOfMemoryError))
        except Exception as error:  # any error: each job of the batch must get an answer
            for job, _ in batch.members:
                _fail(job, error)
            if isinstance(error, EngineLostError):
                raise
        return None

    async def _prepared(self, batch: _Batch) -> Work | None:
        """Prepare the units of callers that still wait, again if one is cancelled meanwhile; None if none is left."""
        work = await self._prepared_ahead(batch)
        while batch.drop_done() or work is None:
            if not batch.members:
                return None
            work = await self._prepare(batch)
        return work

    async def _prepared_ahead(self, batch: _Batch) -> Work | None:
        """The work that was prepared ahead; None if the batch must be prepared now.

        It must be prepared now if nothing was prepared, if a caller was cancelled, or if memory could not hold it in
        addition to the batch that was being computed.
        """
        if batch.drop_done():
            batch.cancel_ahead()
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
        tasks = [ScoringTask(job.engine, unit.trunk, job.terms.group) for job, unit in batch.members]
        return asyncio.get_running_loop().run_in_executor(self._host, prepare_batch, tasks, wants)

    async def _run_on_device(self, batch: _Batch, work: Work) -> tuple[Scores, float]:
        """Compute on the device thread: the scores and the seconds. The next batch can be prepared meanwhile."""
        for job, _ in batch.members:
            job.started_at = job.started_at or time.perf_counter()
        self._device_busy = True
        try:
            self._prepare_ahead()
            return await asyncio.get_running_loop().run_in_executor(self._device, _timed, work)
        finally:
            self._device_busy = False

    def _deliver(self, members: Sequence[Member], results: Scores, seconds: float, work: Work) -> None:
        """Add the scores to their jobs, and resolve the jobs that are complete."""
        estimate = tokens_together(unit for _, unit in members)
        self.admission.measured(estimate, seconds)
        tokens = work.tokens if isinstance(work, CountedWork) else estimate
        self._metrics.batch(
            tokens=tokens,
            shared_tokens=sum(unit.tokens_unshared for _, unit in members) - tokens,
            fill=tokens / self._max_batch_tokens,
            seconds=seconds,
        )
        # Units of a job are computed in the order of its branches, also after a split, so appending keeps that order.
        for (job, unit), scores in zip(members, results, strict=True):
            job.scores[unit.trunk_index].extend(_wanted(score, job.wants) for score in scores)
            job.waiting -= 1
            if job.waiting == 0 and not job.done.done():
                job.done.set_result(None)
        for job in {job for job, _ in members}:
            job.compute_s += seconds  # waiters read it later: they resume only when the event loop is free

    async def _compute_halves(self, members: Sequence[Member], failed: _Failed) -> None:
        """Compute a failed batch as two. Only a sequence that fails as the only one in a batch fails its request."""
        if len(members) > 1:
            half = len(members) // 2
            await self._compute(_Batch([*members[:half]]))
            await self._compute(_Batch([*members[half:]]))
            return
        job, unit = members[0]
        if len(unit.trunk.branches) > 1:
            job.waiting += 1  # one unit becomes two
            for part in halved(unit, job.engine.cost(unit.trunk)):
                await self._compute(_Batch([(job, part)]))
            return
        if not failed.for_memory:
            _fail(job, SequenceError(failed.reason))
            return
        message = f"one sequence of {unit.trunk.tokens} tokens does not fit into device memory: {failed.reason}"
        _fail(job, refuse("out_of_memory", message))

    def _job(self, engine: Engine, trunks: Sequence[Trunk], wants: Wants, terms: Terms) -> Job:
        costs = [engine.cost(trunk) for trunk in trunks]
        units = deque(units_of_request(trunks, costs, self._max_batch_tokens, (engine, terms.group)))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return Job(engine, units, wants, terms, [[] for _ in trunks], len(units), done, time.perf_counter())


def cost_tokens(engine: Engine, trunks: Sequence[Trunk]) -> int:
    """Tokens that trunks count in the queue: what their pair computes for them without other requests."""
    return sum(engine.cost(trunk).tokens for trunk in trunks)


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)


def _timed(work: Work) -> tuple[Scores, float]:
    started_at = time.perf_counter()
    return work(), time.perf_counter() - started_at


def _no_work() -> None:
    """Does nothing. When it returns, the thread has finished its previous work."""


def _check_shape(trunks: Sequence[Trunk], results: Sequence[Sequence[TokenScores]]) -> None:
    """Raises RuntimeError if an engine lost or added a branch or a token: scores would reach the wrong request."""
    expected, found = [len(trunk.branches) for trunk in trunks], [len(scores) for scores in results]
    if expected != found:
        raise RuntimeError(f"the engine returned scores of {found} branches instead of {expected}")
    for trunk, branches in zip(trunks, results, strict=True):
        tokens = [int(branch.scored_T.sum()) for branch in trunk.branches]
        answered = [scores.tokens for scores in branches]
        if tokens != answered:
            raise RuntimeError(f"the engine returned scores of {answered} tokens instead of {tokens}")


def _wanted(scores: TokenScores, wants: Wants) -> TokenScores:
    """The scores without the quantities that only other requests wanted: an answer depends only on its own request."""
    k = wants.top_k
    return TokenScores(
        scores.sft_logprob_S,
        scores.reference_logprob_S,
        kl_S=scores.kl_S if wants.kl else None,
        entropy_S=scores.entropy_S if wants.entropy else None,
        varentropy_S=scores.varentropy_S if wants.varentropy else None,
        candidate_sft_logprob_SK=scores.candidate_sft_logprob_SK,
        candidate_reference_logprob_SK=scores.candidate_reference_logprob_SK,
        top_ids_SK=_first(scores.top_ids_SK, k),
        top_sft_logprob_SK=_first(scores.top_sft_logprob_SK, k),
        top_reference_logprob_SK=_first(scores.top_reference_logprob_SK, k),
        value_S=scores.value_S,
        teacher=scores.teacher,
    )


def _first(array_SK: NDArray[Number] | None, k: int) -> NDArray[Number] | None:
    return None if array_SK is None or k == 0 else np.ascontiguousarray(array_SK[:, :k])
