"""Scheduling: round robin, token budgets, shared prompts, bulk requests."""

import asyncio
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from batcher_harness import BUDGET_TOKENS, assert_named, held_by, running, soon, submitted
from dense_reward.batching import packing, scheduler
from dense_reward.batching.batcher import Computed
from dense_reward.batching.scheduler import (
    BULK_PATIENCE,
    BatchTokens,
    Job,
    Scheduler,
    Terms,
    Unit,
    tokens_together,
    units_of,
    units_of_request,
)
from dense_reward.records import Branch, Cost, Trunk, Wants
from faulty_engines import Gate, Recorder, packed, padded, tokens_computed, trunk, unlike
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("items", [(100, 5), (1000, 20), (1000, 97)], ids=str)
def test_a_short_request_waits_for_no_more_than_two_batches_of_a_long_one(items: tuple[int, int]) -> None:
    gate = Gate()
    engine = Recorder(gate)
    count, length = items

    async def ask() -> None:
        async with running(engine) as batcher:
            long = submitted(batcher.submit([trunk(1, length) for _ in range(count)], Wants()))
            await held_by(gate, long)
            short = submitted(batcher.submit([trunk(2, 3)], Wants()))
            await held_by(gate, long, short)
            gate.opened.set()
            await soon(short)
            long.cancel()

    asyncio.run(ask())
    first_with_it = next(i for i, batch in enumerate(engine.batches) if any(t.prompt_P[0] == 2 for t in batch))
    assert first_with_it <= 2


def test_requests_take_turns() -> None:
    gate = Gate()
    engine = Recorder(gate)

    async def ask() -> None:
        async with running(engine) as batcher:
            first = submitted(batcher.submit(unlike(2, 0, 98), Wants()))
            await held_by(gate, first)
            tasks = [submitted(batcher.submit(unlike(20, name, 18), Wants())) for name in (1, 2, 3)]
            await held_by(gate, *tasks)
            gate.opened.set()
            await soon(asyncio.gather(first, *tasks))

    asyncio.run(ask())
    assert [name for names in engine.names[2:] for name in names] == [1, 2, 3] * 20


def test_a_long_request_has_its_turn_however_many_short_ones_keep_coming() -> None:
    gate = Gate()
    engine = Recorder(gate)

    async def ask() -> None:
        async def keep_asking() -> None:
            while True:
                await batcher.submit([trunk(2, 60)], Wants())

        async with running(engine) as batcher:
            long = submitted(batcher.submit([trunk(1, 90)] * 10, Wants()))
            await held_by(gate, long)
            others = [submitted(keep_asking()) for _ in range(5)]
            gate.opened.set()
            await soon(long)
            for other in others:
                other.cancel()

    asyncio.run(ask())
    last = max(i for i, names in enumerate(engine.names) if 1 in names)
    assert last <= 10 + 10 * 5


@pytest.mark.parametrize(("names", "batches"), [((1, 1, 1), [[1, 1, 1]]), ((1, 2, 1), [[1], [2], [1]])], ids=str)
def test_requests_that_wait_together_share_an_equal_prompt(names: tuple[int, ...], batches: list[list[int]]) -> None:
    gate = Gate()
    engine = Recorder(gate)
    asked = [trunk(name, 10 + i, prompt_tokens=60) for i, name in enumerate(names)]

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(0, 97)], Wants()))
            await held_by(gate, first)
            tasks = [submitted(batcher.submit([one], Wants())) for one in asked]
            await held_by(gate, *tasks)
            gate.opened.set()
            return await soon(asyncio.gather(*tasks))

    for one, computed in zip(asked, asyncio.run(ask()), strict=True):
        assert_named(computed, [one])
    assert engine.names[1:] == batches
    assert max(engine.batch_tokens) <= BUDGET_TOKENS


def test_the_prompts_of_one_request_are_shared_too() -> None:
    engine = Recorder()
    asked = unlike(8, 1, 10, prompt_tokens=60)

    async def ask() -> Computed:
        async with running(engine) as batcher:
            return await soon(batcher.submit(asked, Wants()))

    assert_named(asyncio.run(ask()), asked)
    assert [len(batch) for batch in engine.batches] == [4, 4]


def job_of(units: list[Unit], loop: asyncio.AbstractEventLoop) -> Job:
    return Job(Recorder(), deque(units), Wants(), Terms(), [], len(units), loop.create_future(), 0.0)


PROMPTS = st.tuples(st.integers(1, 4), st.integers(1, 40), st.lists(st.integers(0, 60), max_size=4))
EVENTS = st.lists(st.one_of(st.lists(PROMPTS, min_size=1, max_size=4), st.sampled_from(["take", "forget"])))


@given(events=EVENTS, budget_tokens=st.integers(1, 150))
def test_whoever_comes_and_goes_a_batch_stays_within_its_budget_and_is_taken_ahead_only_if_full(
    events: list[list[tuple[int, int, list[int]]] | str], budget_tokens: int
) -> None:
    loop = asyncio.new_event_loop()
    scheduler, jobs = Scheduler(budget_tokens), list[Job]()
    for event in [*events, *["take"] * 200]:
        left = [unit for job in jobs for unit in job.units]
        assert scheduler.fills_a_batch == (tokens_together(left) >= budget_tokens)
        if event == "forget":
            scheduler.forget(jobs.pop(0)) if jobs else None
        elif event == "take":
            batch = scheduler.take()
            assert bool(batch) == bool(left)
            tokens = tokens_together(unit for _, unit in batch)
            assert tokens <= tokens_computed([unit.trunk for _, unit in batch])
            assert tokens <= budget_tokens or len(batch) == 1
        elif not isinstance(event, str):
            trunks = [trunk(name, *lengths, prompt_tokens=prompt) for name, prompt, lengths in event]
            units = [u for i, t in enumerate(trunks) for u in units_of(i, t, packed(t), budget_tokens, "pair")]
            jobs.append(job_of(units, loop))
            scheduler.add(jobs[-1])
    assert not scheduler
    loop.close()


def test_a_branch_is_cut_off_where_the_budget_ends_and_takes_its_prompt_along() -> None:
    group = trunk(1, 4, 4, 5, 3, prompt_tokens=10)
    units = list(units_of(0, group, Cost(10, (4, 4, 5, 0)), 18, "pair"))
    assert [len(unit.trunk.branches) for unit in units] == [2, 2]
    assert [unit.branch_tokens for unit in units] == [8, 5]
    assert tokens_together(units) == 23


NESTED = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.lists(st.lists(st.integers(0, 1), max_size=6))),
    min_size=1,
    max_size=6,
)


@given(prompts=NESTED, data=st.data())
def test_what_units_begin_with_is_counted_once_and_never_less_than_a_row_computes(
    prompts: list[tuple[list[int], list[list[int]]]], data: st.DataObject
) -> None:
    trunks = [
        Trunk(np.array(prompt, np.int32), tuple(Branch(np.array(b, np.int32), np.ones(len(b), bool)) for b in branches))
        for prompt, branches in prompts
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "BLOCK_TOKENS", 2)
        patch.setattr(packing, "SHARED_LEAST", 1)
        costs = [
            Cost(
                len(trunk.prompt_P) if any(b.scored_T.any() for b in trunk.branches) else 0,
                tuple(packing.computed_tokens(len(trunk.prompt_P), b) for b in trunk.branches),
            )
            for trunk in trunks
        ]
        units = [u for t, c in zip(trunks, costs, strict=True) for u in units_of(0, t, c, 1000, "pair")]
        rows = packing.pack(trunks, max_tokens=1000)
        tokens = tokens_together(units)
        assert tokens >= sum(len(row.ids_N) for row in rows)
        assert tokens <= sum(unit.tokens_unshared for unit in units)
        for at in range(len(units)):  # in any order, and after others have come and gone
            counted = BatchTokens()
            for unit in data.draw(st.permutations(units)):
                counted.add(unit)
            assert counted.tokens == tokens
            counted.remove(units[at])
            assert counted.tokens == tokens_together(unit for unit in units if unit is not units[at])


def test_conversations_with_one_system_prompt_are_counted_as_they_are_computed() -> None:
    ids = np.arange(2000, dtype=np.int32)
    system, first, second = ids[:640], ids[700:956], ids[1000:1064]
    turns = [(system, first), (np.concatenate([system, first]), second), (system, second)]
    units = [
        unit
        for prompt, response in turns
        for unit in units_of(
            0,
            Trunk(prompt, (Branch(response, np.ones(len(response), bool)),)),
            Cost(len(prompt), (len(response),)),
            4096,
            "pair",
        )
    ]
    assert tokens_together(units) == 640 + 256 + 64 + 64


def turns_of(conversation: int, turns: int) -> list[Unit]:
    """The units of a request that scores every answer of a conversation: 128 tokens of system prompt, 192 a turn."""
    system, random = np.arange(128, dtype=np.int32), np.random.default_rng(conversation)
    before, trunks = system, []
    for _ in range(turns):
        user, answer = random.integers(1000, 2000, 64), random.integers(1000, 2000, 128)
        prompt = np.concatenate([before, user]).astype(np.int32)
        trunks.append(Trunk(prompt, (Branch(answer.astype(np.int32), np.ones(128, bool)),)))
        before = np.concatenate([prompt, answer])
    return list(units_of_request(trunks, [packed(trunk) for trunk in trunks], 4096, "pair"))


def test_the_turns_of_a_conversation_are_computed_in_one_batch() -> None:
    loop = asyncio.new_event_loop()
    waiting = Scheduler(4096)
    jobs = [job_of(turns_of(conversation, 6), loop) for conversation in range(8)]
    for job in jobs:
        waiting.add(job)
    batches = []
    while waiting:
        batches.append(waiting.take())
    assert [len(batch) for batch in batches] == [3 * 6, 3 * 6, 2 * 6]
    assert [tokens_together(unit for _, unit in batch) for batch in batches] == [128 + n * 6 * 192 for n in (3, 3, 2)]
    loop.close()


def test_what_belongs_together_but_is_more_than_a_batch_shares_batches_with_others() -> None:
    loop = asyncio.new_event_loop()
    waiting = Scheduler(4096)
    prompt, response = np.arange(5000, 6024, dtype=np.int32), Branch(np.arange(96, dtype=np.int32), np.ones(96, bool))
    trunks = [Trunk(prompt, (replace(response, ids_T=response.ids_T + at),)) for at in range(100)]
    long = job_of(list(units_of_request(trunks, [packed(trunk) for trunk in trunks], 4096, "pair")), loop)
    short = job_of(turns_of(1, 2), loop)
    assert [unit.follows for unit in long.units] == [False] + [True] * 99
    waiting.add(long)
    waiting.add(short)
    batches = [waiting.take(), waiting.take()]
    assert [job for job, _ in batches[0]] == [long] * 32
    assert [job for job, _ in batches[1]] == [short] * 2 + [long] * 26
    loop.close()


def test_responses_to_prompts_that_are_short_or_unlike_take_turns() -> None:
    prompts = [np.arange(100, dtype=np.int32) + 1000 * i for i in range(3)]
    response = Branch(np.arange(60, dtype=np.int32), np.ones(60, bool))
    trunks = [Trunk(prompt, (response,)) for prompt in (prompts[0], prompts[1], prompts[2], prompts[2])]
    found = units_of_request(trunks, [packed(trunk) for trunk in trunks], 4096, "pair")
    assert [unit.follows for unit in found] == [False, False, False, True]
    found = units_of_request(trunks, [padded(trunk) for trunk in trunks], 4096, "pair")
    assert not any(unit.follows for unit in found)


def taken(scheduler: Scheduler) -> list[str]:
    """The priority of each unit of the next batch."""
    return ["bulk" if job.terms.bulk else "interactive" for job, _ in scheduler.take()]


def scheduler_with(loop: asyncio.AbstractEventLoop, *requests: tuple[bool, int]) -> Scheduler:
    """Batches of 100 tokens. Each request is a pair: whether it is bulk, and its number of units of 50 tokens."""
    scheduler = Scheduler(100)
    for place, (bulk, count) in enumerate(requests):
        units = [u for i in range(count) for u in units_of(i, trunk(10 * place + i, 48), packed(trunk(0, 48)), 100, "")]
        scheduler.add(replace(job_of(units, loop), terms=Terms(bulk)))
    return scheduler


def test_bulk_takes_what_people_leave() -> None:
    loop = asyncio.new_event_loop()
    scheduler = scheduler_with(loop, (True, 3), (False, 1))
    assert [taken(scheduler) for _ in range(2)] == [["interactive", "bulk"], ["bulk", "bulk"]]
    assert not scheduler
    loop.close()


def test_bulk_is_not_passed_over_for_ever() -> None:
    loop = asyncio.new_event_loop()
    scheduler = scheduler_with(loop, (True, 2), (False, 100))
    batches = [taken(scheduler) for _ in range(BULK_PATIENCE + 2)]
    assert batches == [["interactive"] * 2] * BULK_PATIENCE + [["bulk", "interactive"]] + [["interactive"] * 2]
    loop.close()
