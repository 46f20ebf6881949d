"""One replica in simulated time. Admission and queue are the service's own code; only the device is simulated.

Must not know routes or callers.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from dense_reward.batching.admission import Admission, Permit
from dense_reward.batching.scheduler import Job, Member, Scheduler, Terms, tokens_together, units_of
from dense_reward.engines.fake import FakeEngine
from dense_reward.records import Branch, Cost, Trunk, Wants
from dense_reward.waits import MAX_QUEUE_TOKENS, MAX_REQUEST_S

Call = Callable[[], None]


class EventQueue:
    """Calls by simulated time, in seconds from 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, int, Call]] = []
        self._order = itertools.count()

    def after(self, seconds: float, call: Call) -> None:
        heappush(self._calls, (self.now_s + seconds, next(self._order), call))

    def run(self) -> None:
        """Runs all calls, and those that they add, in order of time."""
        while self._calls:
            self.now_s, _, call = heappop(self._calls)
            call()


@dataclass(frozen=True, slots=True)
class Machine:
    """A batch of n tokens takes overhead_s + n / tokens_per_s, times exp(normal with standard deviation `jitter`)."""

    tokens_per_s: float
    overhead_s: float = 0.0
    jitter: float = 0.0
    max_batch_tokens: int = 16_384
    max_queue_tokens: int = MAX_QUEUE_TOKENS

    def seconds(self, tokens: int, random: np.random.Generator) -> float:
        noise = float(np.exp(random.normal(0.0, self.jitter))) if self.jitter else 1.0
        return (self.overhead_s + tokens / self.tokens_per_s) * noise


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, identified by a number, and the lengths of its responses."""

    prompt: int
    prompt_tokens: int
    response_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to compute if no other request shares the prompt."""
        return self.prompt_tokens + sum(self.response_tokens)


@dataclass(slots=True, eq=False)
class Entry:
    """An admitted request."""

    job: Job
    permit: Permit
    answered: Call


class Replica:
    """Admits or refuses requests, and computes them in batches as `dense_reward.batching.batcher` does."""

    def __init__(self, machine: Machine, events: EventQueue, random: np.random.Generator) -> None:
        self.admission = Admission(machine.max_queue_tokens)
        self.computed_tokens = 0
        self.busy_s = 0.0
        self._machine, self._events, self._random = machine, events, random
        self._scheduler = Scheduler(machine.max_batch_tokens)
        self._entries: dict[Job, Entry] = {}
        self._next: list[Member] | None = None
        self._is_busy = False
        self._engine = FakeEngine()
        self._unused_future = _future()

    @property
    def requests_inside(self) -> int:
        return len(self._entries)

    def submit(self, request: Request, answered: Call) -> Entry:
        """Admits a request. Raises RequestError(queue_full | too_long)."""
        self.admission.check_wait(MAX_REQUEST_S)
        permit = self.admission.permit(0)
        permit.correct(request.tokens)
        job = self._job(request)
        entry = self._entries[job] = Entry(job, permit, answered)
        self._scheduler.add(job)
        self._prepare_ahead()
        self._work()
        return entry

    def holds(self, entry: Entry) -> bool:
        return entry.job in self._entries

    def cancel(self, entry: Entry) -> None:
        """The caller hangs up: queued work is dropped, work in the current batch is still computed."""
        self._scheduler.forget(entry.job)
        self._end(entry.job)

    def _job(self, request: Request) -> Job:
        prompt_P = np.array([request.prompt], dtype=np.int64).view(np.int32)
        trunk = Trunk(prompt_P, (NO_BRANCH,) * len(request.response_tokens))
        cost = Cost(request.prompt_tokens, request.response_tokens)
        units = deque(units_of(0, trunk, cost, self._machine.max_batch_tokens, None))
        return Job(self._engine, units, Wants(), Terms(), [], len(units), self._unused_future, self._events.now_s)

    def _prepare_ahead(self) -> None:
        """Takes a full batch while the device is busy. A batch that is not full can still grow, so it stays queued."""
        if self._is_busy and self._next is None and self._scheduler.fills_a_batch:
            self._next = self._scheduler.take()

    def _work(self) -> None:
        while not self._is_busy and (self._next or self._scheduler):
            batch, self._next = self._next or self._scheduler.take(), None
            wanted = [(job, unit) for job, unit in batch if job in self._entries]
            if wanted:
                self._compute(wanted)

    def _compute(self, batch: list[Member]) -> None:
        tokens = tokens_together(unit for _, unit in batch)
        seconds = self._machine.seconds(tokens, self._random)
        self.computed_tokens += tokens
        self.busy_s += seconds
        self._is_busy = True
        self._prepare_ahead()
        self._events.after(seconds, lambda: self._computed(batch, tokens, seconds))

    def _computed(self, batch: list[Member], tokens: int, seconds: float) -> None:
        """Starts the next batch before the callers of this one can send again."""
        self._is_busy = False
        self.admission.measured(tokens, seconds)
        for job, _ in batch:
            job.waiting -= 1
        answered = [self._end(job) for job in dict.fromkeys(job for job, _ in batch) if self._is_done(job)]
        self._work()
        for entry in answered:
            entry.answered()

    def _is_done(self, job: Job) -> bool:
        return job.waiting == 0 and job in self._entries

    def _end(self, job: Job) -> Entry:
        entry = self._entries.pop(job)
        entry.permit.__exit__()
        return entry


NO_BRANCH = Branch(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))


def _future() -> "asyncio.Future[None]":
    """The service's Job needs a future; nothing awaits it here."""
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()
