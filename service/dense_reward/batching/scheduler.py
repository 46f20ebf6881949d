"""Which units of the waiting requests form the next batch: round robin within a token budget.

Knows no device, no thread and no clock.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import NamedTuple, TypeVar

import numpy as np

from dense_reward.records import Cost, Engine, IdArray, TokenScores, Trunk, Wants

BLOCK_TOKENS = 16
Key = TypeVar("Key", bound=Hashable)


class SharedPrompt(NamedTuple):
    """A prompt that is computed once for all units of a batch whose SharedPrompt is equal.

    `sharers`: the pair and the group of requests that can share it; `ids`: the bytes of its token ids. `blocks`: its
    whole blocks of BLOCK_TOKENS; each block stands for all that precedes it too.
    """

    sharers: Hashable
    ids: bytes
    tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest part of a request that is scheduled: some or all branches of one trunk, computed in one batch.

    `trunk_index`: the trunk's place in its request. `branch_tokens`: the cost of all its branches, without the prompt.
    `branch_blocks`: the blocks that lie in its branches. `follows`: it shares at least half of its tokens with the
    unit before it in its request, as the next turn of a conversation does, so both are taken together.
    """

    trunk_index: int
    trunk: Trunk
    prompt: SharedPrompt
    branch_tokens: int
    branch_blocks: tuple[int, ...] = ()
    follows: bool = False

    @property
    def tokens_unshared(self) -> int:
        """Tokens that the unit would cost if its prompt were computed again for each branch."""
        return self.branch_tokens + self.prompt.tokens * max(1, len(self.trunk.branches))


@dataclass(frozen=True, slots=True)
class Terms:
    """`bulk`: the request yields to interactive ones. `group`: it shares work only with requests of the same group."""

    bulk: bool = False
    group: str | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A request in the queue: the units that no batch has taken yet, and the scores of those that were computed.

    `scores`: one list per trunk, filled in order. `waiting`: units whose scores are missing; at 0 `done` is resolved.
    Jobs are compared by identity. Only the event loop changes them.
    """

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
"""An entry of a batch: a unit, and the job that gets its scores."""
BULK_PATIENCE = 4
"""Batches in a row that interactive requests can fill while bulk requests wait."""


def _drop(counter: Counter[Key], keys: Iterable[Key]) -> None:
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


@dataclass(slots=True)
class BatchTokens:
    """Counts the tokens that the device computes for a set of units: once what several units begin with.

    That is an equal prompt, and of other beginnings whole blocks: a few tokens too many, never too few.
    """

    tokens: int = 0
    _prompts: Counter[SharedPrompt] = field(default_factory=Counter)
    _blocks: Counter[int] = field(default_factory=Counter)

    def added_by(self, unit: Unit) -> int:
        """Tokens that one more unit would add to `tokens`."""
        prompt = unit.prompt
        added = unit.branch_tokens - self._held(unit.branch_blocks)
        return added if prompt in self._prompts else added + prompt.tokens - self._held(prompt.blocks)

    def added_by_all(self, units: Sequence[Unit]) -> int:
        """Tokens that several more units would add."""
        before = self.tokens
        for unit in units:
            self.add(unit)
        added = self.tokens - before
        for unit in reversed(units):
            self.remove(unit)
        return added

    def add(self, unit: Unit) -> None:
        self.tokens += self.added_by(unit)
        self._prompts[unit.prompt] += 1
        self._blocks.update({*unit.prompt.blocks, *unit.branch_blocks})

    def remove(self, unit: Unit) -> None:
        # Removed first: `added_by` then counts the tokens of what no other unit has.
        _drop(self._prompts, [unit.prompt])
        _drop(self._blocks, {*unit.prompt.blocks, *unit.branch_blocks})
        self.tokens -= self.added_by(unit)

    def _held(self, blocks: Iterable[int]) -> int:
        """Tokens of those blocks that the set holds already."""
        return BLOCK_TOKENS * sum(block in self._blocks for block in blocks)


@dataclass(slots=True)
class _RoundRobin:
    """Gives one unit of each job in turn.

    Jobs that the previous batch did not serve come first, oldest first and new arrivals behind them; then those that
    it served.
    """

    _unserved: deque[Job] = field(default_factory=deque)
    _served: deque[Job] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self._unserved or self._served)

    def add(self, job: Job) -> None:
        self._unserved.append(job)

    def forget(self, job: Job) -> bool:
        """Remove a job. Returns whether it was here."""
        for jobs in (self._unserved, self._served):
            if job in jobs:
                jobs.remove(job)
                return True
        return False

    def begin(self) -> None:
        """Begin a new batch."""
        self._unserved.extend(self._served)
        self._served.clear()

    def next(self) -> Job:
        """The first job."""
        return (self._unserved or self._served)[0]

    def serve(self) -> Job:
        """Remove the first job. `served` puts it back."""
        return (self._unserved or self._served).popleft()

    def served(self, job: Job) -> None:
        """Put a job behind all others, unless all of its units were taken."""
        if job.units:
            self._served.append(job)


class Scheduler:
    """Round robin: a batch takes one unit of each job, then again one of each, up to the token budget.

    The turns of a conversation count as one unit: in different batches, each would compute the earlier ones again.

    So a long request cannot delay a new one beyond the next batch, and new ones cannot delay a long one for ever. Bulk
    jobs get the tokens that interactive ones leave in a batch; after BULK_PATIENCE batches that left none, the next
    batch begins with a bulk unit.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._interactive, self._bulk = _RoundRobin(), _RoundRobin()
        self._bulk_passed_over = 0
        self._waiting_tokens = BatchTokens()

    def __bool__(self) -> bool:
        return bool(self._interactive or self._bulk)

    @property
    def fills_a_batch(self) -> bool:
        """Whether the waiting units fill a batch, so that waiting for more would not make it larger."""
        return self._waiting_tokens.tokens >= self._max_batch_tokens

    def add(self, job: Job) -> None:
        (self._bulk if job.terms.bulk else self._interactive).add(job)
        for unit in job.units:
            self._waiting_tokens.add(unit)

    def forget(self, job: Job) -> None:
        """Drop the units of a job that no batch has taken. Does nothing if all were taken."""
        if (self._bulk if job.terms.bulk else self._interactive).forget(job):
            for unit in job.units:
                self._waiting_tokens.remove(unit)

    def take(self) -> list[Member]:
        """Take the next batch. Of a unit that begins like another one in the batch, only the rest is counted."""
        batch: list[Member] = []
        tokens = BatchTokens()
        self._interactive.begin()
        self._bulk.begin()
        if self._bulk and self._bulk_passed_over >= BULK_PATIENCE:
            self._take(self._bulk, batch, tokens)
        while self._interactive and self._fits(self._interactive, batch, tokens):
            self._take(self._interactive, batch, tokens)
        # Bulk units are added only if no interactive unit is left: one that did not fit goes first in the next batch.
        while not self._interactive and self._bulk and self._fits(self._bulk, batch, tokens):
            self._take(self._bulk, batch, tokens)
        served_bulk = any(job.terms.bulk for job, _ in batch)
        self._bulk_passed_over = 0 if served_bulk or not self._bulk else self._bulk_passed_over + 1
        return batch

    def _fits(self, jobs: _RoundRobin, batch: list[Member], tokens: BatchTokens) -> bool:
        """The first unit of a batch always fits: one that is larger than the budget is computed alone.

        Units that are taken together fit together, unless that would be more than a batch: then they are cut anyway.
        """
        if not batch:
            return True
        units, room, alone = list[Unit](), self._max_batch_tokens - tokens.tokens, BatchTokens()
        for unit in _together(jobs.next()):
            units.append(unit)
            alone.add(unit)
            if alone.tokens > self._max_batch_tokens:  # no need to look at the others, which can be thousands
                return tokens.added_by(units[0]) <= room
        return tokens.added_by_all(units) <= room

    def _take(self, jobs: _RoundRobin, batch: list[Member], tokens: BatchTokens) -> None:
        """Take a unit of the first job, and those that follow it, as far as they fit."""
        job = jobs.serve()
        while True:
            unit = job.units.popleft()
            batch.append((job, unit))
            tokens.add(unit)
            self._waiting_tokens.remove(unit)
            follower = job.units[0] if job.units and job.units[0].follows else None
            if follower is None or tokens.tokens + tokens.added_by(follower) > self._max_batch_tokens:
                break
        jobs.served(job)


def _together(job: Job) -> Iterator[Unit]:
    """The next unit of a job, and those that follow it."""
    yield job.units[0]
    yield from takewhile(lambda unit: unit.follows, islice(job.units, 1, None))


def tokens_together(units: Iterable[Unit]) -> int:
    """Tokens that the device computes for the units in one batch: see BatchTokens."""
    tokens = BatchTokens()
    for unit in units:
        tokens.add(unit)
    return tokens.tokens


def units_of_request(
    trunks: Sequence[Trunk], costs: Iterable[Cost], max_batch_tokens: int, sharers: Hashable
) -> Iterator[Unit]:
    """The units of all trunks of a request."""
    before: set[int] = set()
    for index, (trunk, cost) in enumerate(zip(trunks, costs, strict=True)):
        for unit in units_of(index, trunk, cost, max_batch_tokens, sharers):
            blocks = {*unit.prompt.blocks, *unit.branch_blocks}
            shared = BLOCK_TOKENS * len(blocks & before)
            yield replace(unit, follows=2 * shared >= unit.prompt.tokens + unit.branch_tokens > 0)
            before = blocks


def units_of(index: int, trunk: Trunk, cost: Cost, max_batch_tokens: int, sharers: Hashable) -> Iterator[Unit]:
    """Cut a trunk into units that each fit into a batch, with consecutive branches. One larger branch is one unit.

    `index` is the trunk's place in its request. A trunk without branches is one unit.
    """
    blocks = _blocks(hash(sharers), trunk.prompt_P) if cost.shared_tokens else ()
    prompt = SharedPrompt(sharers, trunk.prompt_P.tobytes(), cost.shared_tokens, blocks)

    def unit(start: int, end: int) -> Unit:
        part = Trunk(trunk.prompt_P, trunk.branches[start:end])
        costs = cost.branch_tokens[start:end]
        return Unit(index, part, prompt, sum(costs), _branch_blocks(prompt, part, costs))

    start, tokens = 0, 0
    for end, branch_tokens in enumerate(cost.branch_tokens):
        if end > start and cost.shared_tokens + tokens + branch_tokens > max_batch_tokens:
            yield unit(start, end)
            start, tokens = end, 0
        tokens += branch_tokens
    yield unit(start, len(trunk.branches))


def _blocks(before: int, ids_L: IdArray) -> tuple[int, ...]:
    """The whole blocks of some ids: each is a hash of its ids and of the block before it, the first of `before`."""
    found = []
    ids, step = ids_L.tobytes(), BLOCK_TOKENS * ids_L.itemsize
    for start in range(0, len(ids) - step + 1, step):
        before = hash((before, ids[start : start + step]))
        found.append(before)
    return tuple(found)


def _branch_blocks(prompt: SharedPrompt, trunk: Trunk, computed_tokens: Sequence[int]) -> tuple[int, ...]:
    """The distinct blocks that lie in computed tokens of branches. One that begins in the prompt is not among them."""
    if not prompt.tokens:
        return ()
    before = prompt.blocks[-1] if prompt.blocks else hash(prompt.sharers)
    rest_P = trunk.prompt_P[len(prompt.blocks) * BLOCK_TOKENS :]
    found: set[int] = set()
    for branch, tokens in zip(trunk.branches, computed_tokens, strict=True):
        blocks = _blocks(before, np.concatenate([rest_P, branch.ids_T[:tokens]]))
        found.update(blocks[1:] if len(rest_P) else blocks)
    return tuple(found)


def halved(unit: Unit, cost: Cost) -> tuple[Unit, Unit]:
    """Cut a unit of several branches in two. `cost` is that of the unit's own trunk."""
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
