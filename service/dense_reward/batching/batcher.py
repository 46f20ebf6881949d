"""The loop that feeds the device: takes batches from the scheduler, prepares and computes them, delivers the scores.

While the device computes one batch, the next batch fills. When that is full, it is prepared and, on a GPU, launched
behind the other, so that the device never waits for the host. There is no polling and no timer. Does not import torch.
The invariants:

- One event loop, one device thread. All state here is read and changed only on the event loop. The device thread only
  launches prepared work (and runs `on_device` calls), one at a time; a second thread prepares, a third waits for
  results. On a CPU launching is computing.
- Every waiter gets an answer: `submit` returns scores or raises. A batch's scores or failure reach each of its jobs,
  and when `run` ends, for whatever reason, all other jobs fail with `draining`. Otherwise a waiter would hold its
  permit, and thus queue capacity, for ever.
- Parts of a failed batch are tried only when nothing refers to the tensors of that batch: they need this memory. The
  traceback of its exception, its preparation and the thread that ran its work can refer to them.
- Two batches are under way at most, the second one only if it was full: units leave the scheduler when a batch is
  taken. After that, no shorter request can overtake them, and no request can join them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dense_reward.batching.admission import Admission
from dense_reward.batching.deduplicate import ScoringTask, prepare_batch
from dense_reward.batching.results import check_shape, wanted
from dense_reward.batching.scheduler import Job, Member, Scheduler, Terms, halved, tokens_together, units_of_request
from dense_reward.errors import (
    RETRY_UNAVAILABLE_S,
    EngineLostError,
    LoadingStoppedError,
    OutOfMemoryError,
    SequenceError,
    refuse,
)
from dense_reward.records import Engine, Result, Scores, StagedWork, Trunk, Wants
from dense_reward.telemetry.metrics import Metrics

INTERACTIVE = Terms()
MANY_TRUNKS = 256
"""Requests with more are cut into units on another thread: a thousand take some 10 ms."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The scores per trunk and branch, and where the time went.

    `queue_s`: until the request's first batch was launched. `compute_s`: the device time of all its batches, each
    counted in full although other requests share it.
    """

    scores: Scores
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class _Batch:
    """Units that are computed together.

    `after`: what computes the batch before it. `on_device`: their launch has begun. `ahead`: their preparation, if it
    began before the device was free.

    No other variable may refer to that future: if it failed, its traceback keeps tensors of the batch alive.
    """

    members: list[Member]
    ahead: "asyncio.Future[StagedWork[Scores]] | None" = None
    after: "asyncio.Task[None] | None" = None
    on_device: bool = False

    @property
    def trunks(self) -> list[Trunk]:
        return [unit.trunk for _, unit in self.members]

    def drop_done(self) -> bool:
        """Drop units whose request was cancelled, or failed with another batch. Returns whether there were any."""
        before = len(self.members)
        self.members = [(job, unit) for job, unit in self.members if not job.done.done()]
        return len(self.members) < before

    async def wait_for_turn(self) -> None:
        """Returns once the batch before it is delivered."""
        if self.after is not None:
            await asyncio.wait([self.after])

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


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch on the device, since `at_s`; `collect` waits for its scores."""

    at_s: float
    collect: Callable[[], Scores]
    tokens: int | None


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
        self._closing = False
        self._end: asyncio.Future[None] | None = None
        """Exists while `run` does; done when it should end."""
        self._lost: Exception | None = None
        self._under_way: dict[asyncio.Task[None], _Batch] = {}
        self._launching = asyncio.Lock()
        self._collected_at_s = 0.0
        self._device, self._host, self._collector = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) for name in ("device", "prepare", "collect")
        )

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
        costs = map(engine.cost, trunks)
        cut = units_of_request(trunks, costs, self._max_batch_tokens, (engine, terms.group))
        units = deque(await asyncio.to_thread(list, cut) if len(trunks) > MANY_TRUNKS else cut)
        if self._closing:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job = Job(engine, units, wants, terms, [[] for _ in trunks], len(units), done, time.perf_counter())
        if job.units:
            self._scheduler.add(job)
            self._unanswered.add(job)
            asyncio.get_running_loop().call_soon(self._take)  # after other requests that are submitted at the same time
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
        self._end = asyncio.get_running_loop().create_future()
        try:
            self._take()
            self._end_if_idle()
            await self._end
        finally:
            self.close()
            for executor in (self._device, self._host, self._collector):
                executor.shutdown(wait=False)
            for task, batch in self._under_way.items():
                task.cancel()
                batch.cancel_ahead()
            for job in self._unanswered:
                _fail(job, refuse("draining", "the engine was lost", retry_after_s=RETRY_UNAVAILABLE_S))

    def close(self) -> None:
        """Let `run` return once the queue is empty."""
        self._closing = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """End `run` if it should end, and no batch is under way whose scores may still come."""
        if self._end is None or self._end.done() or self._under_way:
            return
        if self._lost is not None:
            self._end.set_exception(self._lost)
        elif self._closing and not self._scheduler:
            self._end.set_result(None)

    def _take(self) -> None:
        """Take and begin a batch if none is under way, or behind one on the device if it is full: else it can grow."""
        while (
            self._end is not None
            and not self._end.done()
            and self._lost is None
            and self._scheduler
            and (not self._under_way or (self._scheduler.fills_a_batch and self._can_take_second))
        ):
            batch = _Batch(self._scheduler.take(), after=next(iter(self._under_way), None))
            # Here and not in its task: that runs only after all that the event loop has to do now.
            batch.ahead = self._prepare(batch)
            self._under_way[asyncio.get_running_loop().create_task(self._complete(batch))] = batch

    @property
    def _can_take_second(self) -> bool:
        return len(self._under_way) == 1 and next(iter(self._under_way.values())).on_device

    async def _complete(self, batch: _Batch) -> None:
        """Compute a batch that was taken, then take others. An error that is not its jobs' own ends `run`."""
        try:
            await self._compute(batch)
        except Exception as error:
            self._lost = self._lost or error
        finally:
            del self._under_way[asyncio.current_task()]  # type: ignore[arg-type]
            self._take()
            self._end_if_idle()

    async def _compute(self, batch: _Batch) -> None:
        """Compute one batch. If a part of it might succeed, compute its halves."""
        failed = await self._attempt(batch)
        if failed is None:
            return
        if failed.for_memory:
            self._metrics.out_of_memory()
            # The exception can arrive here before a thread has dropped the failed work and its tensors. After another
            # call it has dropped them. The host thread needs no such call: it prepares the halves.
            for executor in (self._device, self._collector):
                await asyncio.get_running_loop().run_in_executor(executor, _no_work)
        await batch.wait_for_turn()
        await self._compute_halves(batch.members, failed)

    async def _attempt(self, batch: _Batch) -> _Failed | None:
        """Deliver a batch's scores, or its failure, to each job. Returns why if the batch must be split instead."""
        try:
            launched = await self._launched(batch)
            if launched is not None:
                scores, seconds = await self._collected(launched)
                check_shape(batch.trunks, scores)
                await batch.wait_for_turn()
                self._deliver(batch.members, scores, seconds, launched.tokens)
        except (OutOfMemoryError, SequenceError) as error:
            # The retry is outside this block: inside it, the traceback would keep the batch's tensors alive.
            return _Failed(str(error), for_memory=isinstance(error, OutOfMemoryError))
        except Exception as error:  # any error: each job of the batch must get an answer
            for job, _ in batch.members:
                _fail(job, error)
            if isinstance(error, EngineLostError):
                raise
        return None

    async def _launched(self, batch: _Batch) -> "_Launched | None":
        """Launch a batch on the device thread as soon as it is free; None if no caller waits, or the engine is lost."""
        async with self._launching:
            work = None if self._lost else await self._prepared(batch)
            if work is None:
                return None
            for job, _ in batch.members:
                job.started_at = job.started_at or time.perf_counter()
            batch.on_device = True
            self._take()
            return await asyncio.get_running_loop().run_in_executor(self._device, _launch, work)

    async def _collected(self, launched: "_Launched") -> tuple[Scores, float]:
        """The scores, and the seconds that the device spent on them: those since it finished the previous batch."""
        collect = asyncio.get_running_loop().run_in_executor(self._collector, _collect, launched.collect)
        scores, collected_at_s = await collect
        seconds = collected_at_s - max(launched.at_s, self._collected_at_s)
        self._collected_at_s = collected_at_s
        return scores, seconds

    async def _prepared(self, batch: _Batch) -> StagedWork[Scores] | None:
        """Prepare the units of callers that still wait, again if one is cancelled meanwhile; None if none is left."""
        work = await self._prepared_ahead(batch)
        while batch.drop_done() or work is None:
            if not batch.members:
                return None
            work = await self._prepare(batch)
        return work

    async def _prepared_ahead(self, batch: _Batch) -> StagedWork[Scores] | None:
        """The work that was prepared ahead; None if the batch must be prepared now.

        It must be prepared now if nothing was prepared, if a caller was cancelled, or if memory could not hold it in
        addition to a batch that was being computed.
        """
        if batch.drop_done():
            batch.cancel_ahead()
        try:
            return None if batch.ahead is None else await batch.ahead
        except OutOfMemoryError:
            if batch.after is None:
                raise
        finally:
            batch.ahead = None
        await asyncio.sleep(0)  # until this step of the task ends, asyncio holds the future, and thus the tensors
        return None

    def _prepare(self, batch: _Batch) -> "asyncio.Future[StagedWork[Scores]]":
        wants = Wants()
        for job, _ in batch.members:
            wants = wants | job.wants
        tasks = [ScoringTask(job.engine, unit.trunk, job.terms.group) for job, unit in batch.members]
        return asyncio.get_running_loop().run_in_executor(self._host, prepare_batch, tasks, wants)

    def _deliver(self, members: Sequence[Member], results: Scores, seconds: float, counted: int | None) -> None:
        """Add the scores to their jobs, and resolve the jobs that are complete."""
        estimate = tokens_together(unit for _, unit in members)
        self.admission.measured(estimate, seconds)
        tokens = estimate if counted is None else counted
        self._metrics.batch(
            tokens=tokens,
            shared_tokens=sum(unit.tokens_unshared for _, unit in members) - tokens,
            fill=tokens / self._max_batch_tokens,
            seconds=seconds,
        )
        # Units of a job are delivered in the order of its branches, also after a split, so appending keeps that order.
        for (job, unit), scores in zip(members, results, strict=True):
            job.scores[unit.trunk_index].extend(wanted(score, job.wants) for score in scores)
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


def cost_tokens(engine: Engine, trunks: Sequence[Trunk]) -> int:
    """Tokens that trunks count in the queue: what their pair computes for them without other requests."""
    return sum(engine.cost(trunk).tokens for trunk in trunks)


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)


def _launch(work: StagedWork[Scores]) -> _Launched:
    at_s = time.perf_counter()
    return _Launched(at_s, work.launch(), work.tokens)


def _collect(collect: Callable[[], Scores]) -> tuple[Scores, float]:
    return collect(), time.perf_counter()


def _no_work() -> None:
    """Does nothing. When it returns, the thread has finished its previous work."""
