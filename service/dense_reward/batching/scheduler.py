"""What waits for the device: requests cut into units, which take turns. Knows no device, no thread and no clock."""

import asyncio
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from dense_reward.records import Cost, Engine, TokenScores, Trunk, Wants

Prompt = tuple[Hashable, bytes, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a request that is computed at once: some branches of one trunk.

    `prompt`: who may share it, its ids, and the tokens that it costs, once for all units in which all of it is equal.
    """

    trunk_index: int
    trunk: Trunk
    prompt: Prompt
    branch_tokens: int

    @property
    def tokens_unshared(self) -> int:
        """What the unit would cost if each of its branches had its prompt computed anew."""
        return self.branch_tokens + self.prompt[2] * max(1, len(self.trunk.branches))


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is treated beside others: after those of people, and sharing work with those of its group alone."""

    bulk: bool = False
    group: str | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A request: the units that were not taken yet, and the scores of those that were computed."""

    engine: Engine
    units: deque[Unit]
    wants: Wants
    terms: Terms
    scores: list[list[TokenScores]]
    waiting: int
    done: asyncio.Future[None]
    queued_at: float
    started_at: float | None = None
    compute_s: float = 0.0


Member = tuple[Job, Unit]
BULK_PATIENCE = 4
"""Batches in a row that requests of people may fill while bulk waits."""


@dataclass(slots=True)
class Load:
    """The tokens that the device computes for some units together: a prompt once, however many of them share it."""

    tokens: int = 0
    _prompts: Counter[Prompt] = field(default_factory=Counter)

    def added_by(self, unit: Unit) -> int:
        """What one more unit would add to `tokens`."""
        return unit.branch_tokens + (0 if self._prompts[unit.prompt] else unit.prompt[2])

    def add(self, unit: Unit) -> None:
        self.tokens += self.added_by(unit)
        self._prompts[unit.prompt] += 1

    def remove(self, unit: Unit) -> None:
        self._prompts[unit.prompt] -= 1
        if not self._prompts[unit.prompt]:
            del self._prompts[unit.prompt]
        self.tokens -= self.added_by(unit)


@dataclass(slots=True)
class _RoundRobin:
    """Jobs in turn. First come those that had no turn in the batch before, new ones last."""

    _first: deque[Job] = field(default_factory=deque)
    _again: deque[Job] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self._first or self._again)

    def add(self, job: Job) -> None:
        self._first.append(job)

    def forget(self, job: Job) -> bool:
        """Whether it was there."""
        for jobs in (self._first, self._again):
            if job in jobs:
                jobs.remove(job)
                return True
        return False

    def begin(self) -> None:
        """A new batch."""
        self._first.extend(self._again)
        self._again.clear()

    def next(self) -> Unit:
        return (self._first or self._again)[0].units[0]

    def take(self) -> Member:
        job = (self._first or self._again).popleft()
        unit = job.units.popleft()
        if job.units:
            self._again.append(job)
        return job, unit


class Scheduler:
    """Jobs in turn; a batch takes one unit of each, again and again, up to the token budget.

    So a long request keeps no new one from the next batch, and new ones keep no long request from the one after. Bulk
    takes what is left in a batch; where nothing was left in BULK_PATIENCE of them, the next one begins with it.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._interactive, self._bulk = _RoundRobin(), _RoundRobin()
        self._bulk_passed_over = 0
        self._load = Load()

    def __bool__(self) -> bool:
        return bool(self._interactive or self._bulk)

    @property
    def fills_a_batch(self) -> bool:
        """Whether a batch taken now could not grow by waiting."""
        return self._load.tokens >= self._max_batch_tokens

    def add(self, job: Job) -> None:
        (self._bulk if job.terms.bulk else self._interactive).add(job)
        for unit in job.units:
            self._load.add(unit)

    def forget(self, job: Job) -> None:
        """Drop what is left of a job."""
        if (self._bulk if job.terms.bulk else self._interactive).forget(job):
            for unit in job.units:
                self._load.remove(unit)

    def take(self) -> list[Member]:
        """The next batch. A unit whose prompt is in it already adds its branches alone."""
        batch: list[Member] = []
        load = Load()
        self._interactive.begin()
        self._bulk.begin()
        if self._bulk and self._bulk_passed_over >= BULK_PATIENCE:
            self._take(self._bulk, batch, load)
        while self._interactive and self._fits(self._interactive, batch, load):
            self._take(self._interactive, batch, load)
        while not self._interactive and self._bulk and self._fits(self._bulk, batch, load):
            self._take(self._bulk, batch, load)
        served = any(job.terms.bulk for job, _ in batch)
        self._bulk_passed_over = 0 if served or not self._bulk else self._bulk_passed_over + 1
        return batch

    def _fits(self, turns: _RoundRobin, batch: list[Member], load: Load) -> bool:
        """Whatever comes first in a batch does."""
        return not batch or load.tokens + load.added_by(turns.next()) <= self._max_batch_tokens

    def _take(self, turns: _RoundRobin, batch: list[Member], load: Load) -> None:
        job, unit = turns.take()
        batch.append((job, unit))
        load.add(unit)
        self._load.remove(unit)


def tokens_together(units: Iterable[Unit]) -> int:
    """What the device computes for the units in one batch."""
    load = Load()
    for unit in units:
        load.add(unit)
    return load.tokens


def units_of(index: int, trunk: Trunk, cost: Cost, max_batch_tokens: int, sharers: Hashable) -> Iterator[Unit]:
    """The trunk, with its branches spread over several units where they are more than a batch holds."""
    prompt = sharers, trunk.prompt_P.tobytes(), cost.shared_tokens
    start, tokens = 0, 0
    for end, branch_tokens in enumerate(cost.branch_tokens):
        if end > start and cost.shared_tokens + tokens + branch_tokens > max_batch_tokens:
            yield Unit(index, Trunk(trunk.prompt_P, trunk.branches[start:end]), prompt, tokens)
            start, tokens = end, 0
        tokens += branch_tokens
    yield Unit(index, Trunk(trunk.prompt_P, trunk.branches[start:]), prompt, tokens)


def halved(unit: Unit, cost: Cost) -> tuple[Unit, Unit]:
    """A unit of several branches cut in two."""
    middle = len(unit.trunk.branches) // 2
    first, second = (
        Unit(
            unit.trunk_index,
            Trunk(unit.trunk.prompt_P, unit.trunk.branches[part]),
            unit.prompt,
            sum(cost.branch_tokens[part]),
        )
        for part in (slice(middle), slice(middle, None))
    )
    return first, second
