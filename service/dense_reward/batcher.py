"""Waiting requests -> batches for the device. One event loop, one device thread, a queue bounded in tokens. No torch.

While one batch is computed the next one fills: there is no polling and no timer. Requests take turns, so that a short
one does not wait for the whole of a long one. Every waiter gets an answer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dense_reward.engine.base import Engine, TokenScores, Trunk, Wants
from dense_reward.errors import RETRY_UNAVAILABLE_S, EngineLostError, OutOfMemoryError, RequestError, refuse
from dense_reward.metrics import Metrics

Number = TypeVar("Number", np.float32, np.int32)


@dataclass(frozen=True, slots=True)
class Computed:
    """Scores per trunk and branch, with the seconds that the request waited and was computed (its batches whole)."""

    scores: list[list[TokenScores]]
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class _Unit:
    """A piece of a request that is computed at once: some branches of one trunk."""

    trunk_index: int
    trunk: Trunk
    cost_tokens: int


@dataclass(slots=True, eq=False)
class _Job:
    units: deque[_Unit]
    wants: Wants
    scores: list[list[TokenScores]]
    waiting: int
    done: asyncio.Future[None]
    queued_at: float
    started_at: float | None = None
    compute_s: float = 0.0


@dataclass(slots=True)
class Permit:
    """The right to hold `tokens` of the queue, taken at the door; a context manager that gives it back."""

    door: "Door"
    tokens: int

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, *_: object) -> None:
        self.door.held_tokens -= self.tokens
        self.tokens = 0

    def correct(self, tokens: int) -> None:
        """Replace the estimate by the count. Raises RequestError: queue_full, or too_long for what never fits."""
        capacity = self.door.capacity_tokens
        if tokens > capacity:
            message = f"the request has {tokens} tokens, the queue holds {capacity} (--max-queue-tokens)"
            raise refuse("too_long", f"{message}: send it in parts")
        self.door.held_tokens += tokens - self.tokens
        self.tokens = tokens
        self.door.check()


@dataclass(slots=True)
class Door:
    """Counts the tokens of all requests that were let in; `rate` is the measured tokens per second of the device."""

    capacity_tokens: int
    rate_tokens_per_s: float = 0.0
    held_tokens: int = field(default=0)

    def permit(self, tokens: int) -> Permit:
        """Let a request of about `tokens` in. Raises RequestError(queue_full) with the seconds until there is room.

        An estimate above the capacity waits for an empty queue: the count decides whether the request fits at all.
        """
        permit = Permit(self, 0)
        try:
            permit.correct(min(tokens, self.capacity_tokens))
        except RequestError:
            permit.__exit__()
            raise
        return permit

    def check(self) -> None:
        over = self.held_tokens - self.capacity_tokens
        if over <= 0:
            return
        retry_after_s = over / self.rate_tokens_per_s if self.rate_tokens_per_s else 1.0
        message = f"the queue holds {self.capacity_tokens} tokens (--max-queue-tokens) and is full: try again later"
        raise refuse("queue_full", message, retry_after_s=max(1.0, retry_after_s))

    def measured(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so long; one without any says nothing about the device."""
        if not tokens:
            return
        rate = tokens / max(seconds, 1e-6)
        self.rate_tokens_per_s = rate if not self.rate_tokens_per_s else 0.8 * self.rate_tokens_per_s + 0.2 * rate


class Batcher:
    """Feeds one engine from one thread. `run` is the loop, `submit` waits for an answer, `close` ends the loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_batch_tokens: int, max_queue_tokens: int) -> None:
        self.door = Door(max_queue_tokens)
        self._engine = engine
        self._metrics = metrics
        self._max_batch_tokens = max_batch_tokens
        self._jobs: deque[_Job] = deque()
        self._unanswered: set[_Job] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    def cost_tokens(self, trunks: Sequence[Trunk]) -> int:
        """What trunks count in the queue: the tokens that the engine computes for them."""
        return sum(self._engine.cost_tokens(trunk) for trunk in trunks)

    async def submit(self, trunks: Sequence[Trunk], wants: Wants) -> Computed:
        """Scores of all branches. A caller that goes away takes its waiting work with it.

        Raises what the engine raises, RequestError(out_of_memory) where one sequence alone does not fit, and
        RequestError(draining) after close, or where `run` ends before the answer.
        """
        if self._closing:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S)
        units = deque(unit for index, trunk in enumerate(trunks) for unit in self._units(index, trunk))
        job = _Job(
            units,
            wants,
            [[] for _ in trunks],
            len(units),
            asyncio.get_running_loop().create_future(),
            time.perf_counter(),
        )
        if units:
            self._jobs.append(job)
            self._unanswered.add(job)
            self._wake.set()
            try:
                await job.done
            finally:
                self._forget(job)
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
            for job in self._unanswered:
                _fail(job, refuse("draining", "the engine was lost", retry_after_s=RETRY_UNAVAILABLE_S))

    async def _serve(self) -> None:
        while True:
            batch = self._take()
            if batch:
                await self._compute(batch)
            elif self._closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def close(self) -> None:
        """Let `run` return once the queue is empty."""
        self._closing = True
        self._wake.set()

    def _take(self) -> list[tuple[_Job, _Unit]]:
        """The next batch: one unit of each waiting job in turn, up to the token budget."""
        batch: list[tuple[_Job, _Unit]] = []
        tokens = 0
        while self._jobs:
            job = self._jobs[0]
            unit = job.units[0]
            if batch and tokens + unit.cost_tokens > self._max_batch_tokens:
                break
            tokens += unit.cost_tokens
            batch.append((job, job.units.popleft()))
            self._jobs.popleft()
            if job.units:
                self._jobs.append(job)
        return batch

    async def _compute(self, batch: Sequence[tuple[_Job, _Unit]]) -> None:
        """Run one batch on the device thread and hand out its results, or its failure to each caller."""
        batch = [(job, unit) for job, unit in batch if not job.done.done()]  # its caller left, or part of it failed
        if not batch:
            return
        started_at = time.perf_counter()
        wants = Wants()
        for job, _ in batch:
            job.started_at = job.started_at or started_at
            wants = wants | job.wants
        trunks = [unit.trunk for _, unit in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._device, self._engine.score, trunks, wants)
            _check_shape(trunks, results)
            self._hand_out(batch, results, time.perf_counter() - started_at)
            return
        except OutOfMemoryError as error:
            reason = str(error)
        except Exception as error:  # whatever broke the batch, each of its callers must hear of it
            for job, _ in batch:
                _fail(job, error)
            if isinstance(error, EngineLostError):
                raise
            return
        # Not from within `except`: the traceback there keeps the failed batch's tensors alive.
        await self._compute_halves(batch, reason)

    def _hand_out(
        self, batch: Sequence[tuple[_Job, _Unit]], results: Sequence[Sequence[TokenScores]], seconds: float
    ) -> None:
        tokens = sum(unit.cost_tokens for _, unit in batch)
        self.door.measured(tokens, seconds)
        self._metrics.batch(tokens, seconds)
        for (job, unit), scores in zip(batch, results, strict=True):
            job.scores[unit.trunk_index].extend(_wanted(score, job.wants) for score in scores)
            job.waiting -= 1
            if job.waiting == 0 and not job.done.done():
                job.done.set_result(None)
        for job in {id(job): job for job, _ in batch}.values():
            job.compute_s += seconds

    async def _compute_halves(self, batch: Sequence[tuple[_Job, _Unit]], reason: str) -> None:
        """Out of memory: split and try again; only a sequence that fails alone fails."""
        if len(batch) > 1:
            half = len(batch) // 2
            await self._compute(batch[:half])
            await self._compute(batch[half:])
            return
        job, unit = batch[0]
        if len(unit.trunk.branches) > 1:
            middle = len(unit.trunk.branches) // 2
            halves = unit.trunk.branches[:middle], unit.trunk.branches[middle:]
            job.waiting += 1
            for branches in halves:
                await self._compute([(job, self._unit(unit.trunk_index, Trunk(unit.trunk.prompt_P, branches)))])
            return
        message = f"one sequence of {unit.trunk.tokens} tokens does not fit into device memory: {reason}"
        _fail(job, refuse("out_of_memory", message))

    def _unit(self, trunk_index: int, trunk: Trunk) -> _Unit:
        return _Unit(trunk_index, trunk, self._engine.cost_tokens(trunk))

    def _units(self, index: int, trunk: Trunk) -> Iterator[_Unit]:
        """The trunk, with its branches spread over several where they are more than a batch holds."""
        prompt_tokens = self._engine.cost_tokens(Trunk(trunk.prompt_P, ()))
        start, tokens = 0, prompt_tokens
        for end, branch in enumerate(trunk.branches):
            added = self._engine.cost_tokens(Trunk(trunk.prompt_P, (branch,))) - prompt_tokens
            if end > start and tokens + added > self._max_batch_tokens:
                yield _Unit(index, Trunk(trunk.prompt_P, trunk.branches[start:end]), tokens)
                start, tokens = end, prompt_tokens
            tokens += added
        yield _Unit(index, Trunk(trunk.prompt_P, trunk.branches[start:]), tokens)

    def _forget(self, job: _Job) -> None:
        self._unanswered.discard(job)
        if job in self._jobs:
            self._jobs.remove(job)


def _fail(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)


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
        candidate_reward_SK=scores.candidate_reward_SK,
        top_ids_SK=_first(scores.top_ids_SK, k),
        top_sft_logprob_SK=_first(scores.top_sft_logprob_SK, k),
        top_reference_logprob_SK=_first(scores.top_reference_logprob_SK, k),
    )


def _first(array_SK: NDArray[Number] | None, k: int) -> NDArray[Number] | None:
    return None if array_SK is None or k == 0 else np.ascontiguousarray(array_SK[:, :k])
