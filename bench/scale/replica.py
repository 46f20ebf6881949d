"""One replica in simulated time. Its door and its queue are the service's own code; only its device is arithmetic.

Knows no routes and no callers.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from dense_reward.batching.admission import Door, Permit
from dense_reward.batching.scheduler import Job, Member, Terms, Waiting, tokens_together, units_of
from dense_reward.engines.fake import FakeEngine
from dense_reward.records import Branch, Cost, Trunk, Wants

Call = Callable[[], None]
MAX_REQUEST_S = 600.0
"""The service's default of --max-request-s: whoever would wait longer is refused."""


class Agenda:
    """What happens when, in seconds from 0: a heap of calls."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, int, Call]] = []
        self._order = itertools.count()

    def after(self, seconds: float, call: Call) -> None:
        heappush(self._calls, (self.now_s + seconds, next(self._order), call))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._calls:
            self.now_s, _, call = heappop(self._calls)
            call()


@dataclass(frozen=True, slots=True)
class Machine:
    """A batch of n tokens takes overhead_s + n / tokens_per_s, times exp(normal of width `jitter`)."""

    tokens_per_s: float
    overhead_s: float = 0.0
    jitter: float = 0.0
    max_batch_tokens: int = 16_384
    max_queue_tokens: int = 1_048_576

    def seconds(self, tokens: int, random: np.random.Generator) -> float:
        noise = float(np.exp(random.normal(0.0, self.jitter))) if self.jitter else 1.0
        return (self.overhead_s + tokens / self.tokens_per_s) * noise


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, known by its number, and the tokens of the responses to it."""

    prompt: int
    prompt_tokens: int
    response_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Computed for it where nobody else shares its prompt."""
        return self.prompt_tokens + sum(self.response_tokens)


@dataclass(slots=True, eq=False)
class Place:
    """A request inside a replica."""

    job: Job
    permit: Permit
    answered: Call


class Replica:
    """Takes requests in or refuses them, and computes them in batches, as `dense_reward.batching.batcher` does."""

    def __init__(self, machine: Machine, agenda: Agenda, random: np.random.Generator) -> None:
        self.door = Door(machine.max_queue_tokens)
        self.computed_tokens = 0
        self.busy_s = 0.0
        self._machine, self._agenda, self._random = machine, agenda, random
        self._waiting = Waiting(machine.max_batch_tokens)
        self._places: dict[Job, Place] = {}
        self._next: list[Member] | None = None
        self._is_busy = False
        self._engine = FakeEngine()
        self._nobody = _future()

    @property
    def requests_inside(self) -> int:
        return len(self._places)

    def offer(self, request: Request, answered: Call) -> Place:
        """Let a request in. Raises RequestError(queue_full | too_long)."""
        self.door.check_wait(MAX_REQUEST_S)
        permit = self.door.permit(0)
        permit.correct(request.tokens)
        job = self._job(request)
        place = self._places[job] = Place(job, permit, answered)
        self._waiting.add(job)
        self._prepare_ahead()
        self._work()
        return place

    def is_inside(self, place: Place) -> bool:
        return place.job in self._places

    def leave(self, place: Place) -> None:
        """The caller hangs up: what waits is dropped, what is being computed is computed in vain."""
        self._waiting.forget(place.job)
        self._end(place.job)

    def _job(self, request: Request) -> Job:
        prompt_P = np.array([request.prompt], dtype=np.int64).view(np.int32)
        trunk = Trunk(prompt_P, (NO_BRANCH,) * len(request.response_tokens))
        cost = Cost(request.prompt_tokens, request.response_tokens)
        units = deque(units_of(0, trunk, cost, self._machine.max_batch_tokens, None))
        return Job(self._engine, units, Wants(), Terms(), [], len(units), self._nobody, self._agenda.now_s)

    def _prepare_ahead(self) -> None:
        """A full batch is taken while the device is busy; one that is not full may still grow."""
        if self._is_busy and self._next is None and self._waiting.fills_a_batch:
            self._next = self._waiting.take()

    def _work(self) -> None:
        while not self._is_busy and (self._next or self._waiting):
            batch, self._next = self._next or self._waiting.take(), None
            wanted = [(job, unit) for job, unit in batch if job in self._places]
            if wanted:
                self._compute(wanted)

    def _compute(self, batch: list[Member]) -> None:
        tokens = tokens_together(unit for _, unit in batch)
        seconds = self._machine.seconds(tokens, self._random)
        self.computed_tokens += tokens
        self.busy_s += seconds
        self._is_busy = True
        self._prepare_ahead()
        self._agenda.after(seconds, lambda: self._computed(batch, tokens, seconds))

    def _computed(self, batch: list[Member], tokens: int, seconds: float) -> None:
        """The next batch begins before anybody whom this one answered can ask again."""
        self._is_busy = False
        self.door.measured(tokens, seconds)
        for job, _ in batch:
            job.waiting -= 1
        answered = [self._end(job) for job in dict.fromkeys(job for job, _ in batch) if self._is_done(job)]
        self._work()
        for place in answered:
            place.answered()

    def _is_done(self, job: Job) -> bool:
        return job.waiting == 0 and job in self._places

    def _end(self, job: Job) -> Place:
        place = self._places.pop(job)
        place.permit.__exit__()
        return place


NO_BRANCH = Branch(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))


def _future() -> "asyncio.Future[None]":
    """What the service's job has and nobody awaits here."""
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()
