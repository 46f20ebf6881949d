"""The queue: the right answer to everybody, in turn, within the budgets, and never silence."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import pytest
from dense_reward.batcher import Batcher, Computed, Door
from dense_reward.engine.base import Engine, EngineInfo, TokenScores, Trunk, Wants
from dense_reward.engine.fake import FakeEngine
from dense_reward.errors import RequestError
from dense_reward.metrics import Metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from unruly_engines import INFO, PATIENCE_S, Gate, Memory, Recorder, named_scores, trunk

T = TypeVar("T")
BUDGET_TOKENS = 100


@asynccontextmanager
async def running(engine: Engine, *, max_batch_tokens: int = BUDGET_TOKENS) -> AsyncIterator[Batcher]:
    batcher = Batcher(engine, Metrics(), max_batch_tokens=max_batch_tokens, max_queue_tokens=1_000_000)
    loop = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        batcher.close()
        await soon(loop)


async def soon(answer: Awaitable[T]) -> T:
    """The answer; silence is a failure."""
    return await asyncio.wait_for(answer, PATIENCE_S)


def submitted(work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
    return asyncio.create_task(work)


async def held_by(gate: Gate, *tasks: "asyncio.Task[Computed]") -> None:
    """Returns once the gate holds a batch and the tasks have had their turn to queue up."""
    assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


def assert_named(computed: Computed, trunks: Sequence[Trunk]) -> None:
    """Every branch of every trunk, in order, with the scores of that very branch."""
    assert [len(branches) for branches in computed.scores] == [len(trunk.branches) for trunk in trunks]
    for prompt, branches in zip(trunks, computed.scores, strict=True):
        for branch, scores in zip(prompt.branches, branches, strict=True):
            assert scores.sft_logprob_S.tolist() == [float(prompt.prompt_P[0])] * len(branch.ids_T)
            assert scores.reference_logprob_S.tolist() == branch.ids_T.astype(float).tolist()


def test_every_caller_gets_its_own_scores_however_many_ask_at_once() -> None:
    engine, draw = Recorder(), random.Random(0)
    requests = [
        [
            trunk(1000 * r + i, *(draw.randrange(0, 30) for _ in range(draw.randrange(2, 5))))
            for i in range(draw.randrange(1, 6))
        ]
        for r in range(300)
    ]

    async def ask_all() -> list[Computed]:
        async with running(engine) as batcher:
            return await soon(asyncio.gather(*(batcher.submit(request, Wants()) for request in requests)))

    for request, computed in zip(requests, asyncio.run(ask_all()), strict=True):
        assert_named(computed, request)
    assert len(engine.batches) < 2 * sum(t.tokens for request in requests for t in request) / BUDGET_TOKENS


def test_real_numbers_are_those_of_the_engine_asked_alone() -> None:
    random_ids = np.random.default_rng(0).integers(0, 256, 40).astype(np.int32)
    prompt = trunk(5, 3, 0, 7)
    other = Trunk(random_ids, prompt.branches)

    async def ask() -> list[Computed]:
        async with running(FakeEngine()) as batcher:
            return await soon(
                asyncio.gather(*(batcher.submit([t], Wants(kl=True)) for t in (prompt, other, prompt, other)))
            )

    alone = FakeEngine().score([prompt, other], Wants(kl=True))
    for computed, expected in zip(asyncio.run(ask()), alone * 2, strict=True):
        for a, b in zip(computed.scores[0], expected, strict=True):
            assert np.array_equal(a.sft_logprob_S, b.sft_logprob_S)
            assert a.kl_S is not None
            assert b.kl_S is not None
            assert np.array_equal(a.kl_S, b.kl_S)


def test_a_batch_holds_no_more_tokens_than_its_budget() -> None:
    engine = Recorder()
    requests = [[trunk(i, 10 + i % 40, 5) for _ in range(3)] for i in range(40)]

    async def ask() -> None:
        async with running(engine) as batcher:
            await soon(asyncio.gather(*(batcher.submit(request, Wants()) for request in requests)))

    asyncio.run(ask())
    assert max(engine.batch_tokens) <= BUDGET_TOKENS
    assert np.mean(engine.batch_tokens) > 0.6 * BUDGET_TOKENS


def test_a_sequence_larger_than_a_batch_is_computed_alone() -> None:
    engine = Recorder()
    large, small = trunk(1, 500), trunk(2, 3)

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            return await soon(asyncio.gather(*(batcher.submit([t], Wants()) for t in (small, large, small))))

    for computed, asked in zip(asyncio.run(ask()), (small, large, small), strict=True):
        assert_named(computed, [asked])
    assert [len(batch) for batch in engine.batches if any(t.tokens > BUDGET_TOKENS for t in batch)] == [1]


def test_a_group_larger_than_a_batch_is_spread_over_several_and_put_together_in_order() -> None:
    engine = Recorder()
    group = trunk(7, *([20, 0, 31] * 20), prompt_tokens=15)

    async def ask() -> Computed:
        async with running(engine) as batcher:
            return await soon(batcher.submit([trunk(6, 1), group, trunk(8, 2)], Wants()))

    assert_named(asyncio.run(ask()), [trunk(6, 1), group, trunk(8, 2)])
    assert max(engine.batch_tokens) <= BUDGET_TOKENS
    assert len(engine.batches) > 10


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
            first = submitted(batcher.submit([trunk(0, 97)], Wants()))
            await held_by(gate, first)
            tasks = [submitted(batcher.submit([trunk(name, 18)] * 20, Wants())) for name in (1, 2, 3)]
            await held_by(gate, *tasks)
            gate.opened.set()
            await soon(asyncio.gather(first, *tasks))

    asyncio.run(ask())
    order = [int(t.prompt_P[0]) for batch in engine.batches[1:] for t in batch]
    assert order == [1, 2, 3] * 20


def test_a_caller_that_goes_away_takes_its_waiting_work_with_it() -> None:
    gate = Gate()
    engine = Recorder(gate)

    async def ask() -> Computed:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(1, 3), trunk(1, 97), trunk(1, 97)], Wants()))
            await held_by(gate, first)
            gone = submitted(batcher.submit([trunk(2, 97)] * 50, Wants()))
            stays = submitted(batcher.submit([trunk(3, 3)], Wants()))
            await held_by(gate, first, gone, stays)
            gone.cancel()
            first.cancel()
            await asyncio.sleep(0)
            gate.opened.set()
            return await soon(stays)

    assert_named(asyncio.run(ask()), [trunk(3, 3)])
    assert [[int(t.prompt_P[0]) for t in batch] for batch in engine.batches] == [[1], [3]]


def test_a_caller_that_goes_away_while_its_batch_runs_harms_nobody_in_it() -> None:
    gate = Gate()

    async def ask() -> Computed:
        async with running(Recorder(gate)) as batcher:
            gone = submitted(batcher.submit([trunk(1, 3)], Wants()))
            stays = submitted(batcher.submit([trunk(2, 3)], Wants()))
            await held_by(gate, gone, stays)
            gone.cancel()
            gate.opened.set()
            return await soon(stays)

    assert_named(asyncio.run(ask()), [trunk(2, 3)])


def fail_on(name: int, error: Exception) -> Recorder:
    def before(trunks: Sequence[Trunk]) -> None:
        if any(t.prompt_P[0] == name for t in trunks):
            raise error

    return Recorder(before)


def test_a_batch_that_fails_reaches_each_of_its_callers_and_nobody_else() -> None:
    engine = fail_on(2, RuntimeError("device lost"))

    async def ask() -> tuple[list[Computed | BaseException], Computed]:
        async with running(engine) as batcher:
            together = await soon(
                asyncio.gather(*(batcher.submit([trunk(n, 3)], Wants()) for n in (1, 2, 3)), return_exceptions=True)
            )
            return together, await soon(batcher.submit([trunk(4, 3)], Wants()))

    together, later = asyncio.run(ask())
    assert [str(answer) for answer in together] == ["device lost"] * 3
    assert_named(later, [trunk(4, 3)])


def test_what_is_left_of_a_failed_request_is_not_computed() -> None:
    engine = fail_on(2, RuntimeError("device lost"))

    async def ask() -> None:
        async with running(engine) as batcher:
            with pytest.raises(RuntimeError, match="device lost"):
                await soon(batcher.submit([trunk(2, 97) for _ in range(100)], Wants()))

    asyncio.run(ask())
    assert len(engine.batches) == 1


@dataclass(frozen=True, slots=True)
class Forgetful:
    """Loses the last branch of the last trunk, or a whole trunk."""

    whole: bool

    @property
    def info(self) -> EngineInfo:
        return INFO

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        scores = named_scores(trunks, wants)
        return scores[:-1] if self.whole else [*scores[:-1], scores[-1][:-1]]


@pytest.mark.parametrize("whole", [False, True])
def test_an_engine_that_loses_a_branch_mixes_up_nobody_and_stops_nothing(whole: bool) -> None:
    async def ask() -> list[Computed | BaseException]:
        async with running(Forgetful(whole)) as batcher:
            return await soon(
                asyncio.gather(*(batcher.submit([trunk(n, 3, 4)], Wants()) for n in (1, 2)), return_exceptions=True)
            )

    for answer in asyncio.run(ask()):
        assert isinstance(answer, RuntimeError)
        assert "the engine answered" in str(answer)


def test_a_batch_that_does_not_fit_into_memory_is_split_until_it_does() -> None:
    memory = Memory(room_tokens=21)
    engine = Recorder(memory)
    requests = [[trunk(n, 5, 0, 9, 1), trunk(n + 50, 12), trunk(n + 70, 19)] for n in range(5)]

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            return await soon(asyncio.gather(*(batcher.submit(request, Wants()) for request in requests)))

    for request, computed in zip(requests, asyncio.run(ask()), strict=True):
        assert_named(computed, request)
    assert memory.lost


def test_what_a_failed_batch_held_on_the_device_is_let_go_before_its_halves_are_tried() -> None:
    memory = Memory(room_tokens=10)

    async def ask() -> None:
        async with running(Recorder(memory)) as batcher:
            await soon(batcher.submit([trunk(n, 4, 4, 4) for n in range(4)], Wants()))

    asyncio.run(ask())
    assert len(memory.lost) > 3
    assert not memory.still_held


def test_only_a_sequence_that_fails_alone_fails() -> None:
    engine = Recorder(Memory(room_tokens=30))

    async def ask() -> list[Computed | BaseException]:
        async with running(engine) as batcher:
            requests = [[trunk(1, 5)], [trunk(2, 10, 60, 10)], [trunk(3, 7)]]
            return await soon(
                asyncio.gather(*(batcher.submit(request, Wants()) for request in requests), return_exceptions=True)
            )

    first, failed, last = asyncio.run(ask())
    assert isinstance(first, Computed)
    assert isinstance(last, Computed)
    assert isinstance(failed, RequestError)
    assert failed.code == "out_of_memory"
    assert "one sequence of 62 tokens does not fit into device memory: no room" in str(failed)


def test_nobody_gets_what_only_a_batch_mate_asked_for() -> None:
    """Else an answer would depend on who else asks, and somebody else's NaN would be everybody's failure."""
    gate = Gate()
    engine = Recorder(gate)
    asked = [Wants(), Wants(kl=True), Wants(entropy=True), Wants(top_k=2), Wants(top_k=5), Wants(True, True, 1)]

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(0, 97)], Wants()))
            await held_by(gate, first)
            tasks = [submitted(batcher.submit([trunk(1, 3, 2)], wants)) for wants in asked]
            await held_by(gate, *tasks)
            gate.opened.set()
            return await soon(asyncio.gather(*tasks))

    answers = asyncio.run(ask())
    assert engine.wants == [Wants(), Wants(kl=True, entropy=True, top_k=5)]
    for wants, computed in zip(asked, answers, strict=True):
        for scores in computed.scores[0]:
            assert (scores.kl_S is not None) == wants.kl
            assert (scores.entropy_S is not None) == wants.entropy
            for array in (scores.top_ids_SK, scores.top_sft_logprob_SK, scores.top_reference_logprob_SK):
                assert (0 if array is None else array.shape[1]) == wants.top_k


def test_every_field_of_the_scores_is_handed_on() -> None:
    class Everything(Recorder):
        def score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
            n, k = (3,), (3, 2)
            floats = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
            tops = np.zeros(k, np.int32), np.zeros(k, np.float32), np.zeros(k, np.float32)
            return [[TokenScores(*floats, np.zeros(k, np.float32), *tops)]]

    async def ask() -> Computed:
        async with running(Everything()) as batcher:
            return await soon(batcher.submit([trunk(1, 3)], Wants(True, True, 2)))

    scores = asyncio.run(ask()).scores[0][0]
    assert all(getattr(scores, field.name) is not None for field in fields(TokenScores))


def test_a_request_without_trunks_is_answered_at_once() -> None:
    async def ask() -> Computed:
        async with running(Recorder()) as batcher:
            return await soon(batcher.submit([], Wants()))

    assert asyncio.run(ask()) == Computed([], 0.0, 0.0)


def test_the_time_of_waiting_and_the_time_of_computing_are_told_apart() -> None:
    gate = Gate()

    async def ask() -> Computed:
        async with running(Recorder(gate)) as batcher:
            first = submitted(batcher.submit([trunk(1, 97)], Wants()))
            await held_by(gate, first)
            second = submitted(batcher.submit([trunk(2, 3)], Wants()))
            await held_by(gate, first, second)
            await asyncio.sleep(0.2)
            gate.opened.set()
            return await soon(second)

    computed = asyncio.run(ask())
    assert computed.queue_s >= 0.2
    assert 0 < computed.compute_s < computed.queue_s


def test_closing_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    gate = Gate()

    async def ask() -> list[Computed]:
        batcher = Batcher(Recorder(gate), Metrics(), max_batch_tokens=BUDGET_TOKENS, max_queue_tokens=1000)
        loop = submitted(batcher.run())
        waiting = [submitted(batcher.submit([trunk(n, 60)] * 3, Wants())) for n in range(5)]
        await held_by(gate, *waiting)
        batcher.close()
        with pytest.raises(RequestError, match="stopping") as refused:
            await soon(batcher.submit([trunk(9, 1)], Wants()))
        assert refused.value.code == "draining"
        assert refused.value.retry_after_s is not None
        gate.opened.set()
        answers = await soon(asyncio.gather(*waiting))
        await soon(loop)
        return answers

    for n, computed in enumerate(asyncio.run(ask())):
        assert_named(computed, [trunk(n, 60)] * 3)


def test_a_full_queue_says_when_there_will_be_room() -> None:
    door = Door(capacity_tokens=1000)
    door.measured(tokens=500, seconds=2.0)
    with door.permit(800) as held:
        with pytest.raises(RequestError, match=r"1000 tokens \(--max-queue-tokens\) and is full") as refused:
            door.permit(1000)
        assert (refused.value.code, refused.value.status) == ("queue_full", 429)
        assert refused.value.retry_after_s == pytest.approx(800 / 250)
        assert door.held_tokens == 800
        held.correct(900)
        assert door.held_tokens == 900
        door.permit(100).__exit__()
    assert door.held_tokens == 0
    with door.permit(1000):
        assert door.held_tokens == 1000


def test_a_count_above_the_estimate_may_still_find_the_queue_full() -> None:
    door = Door(capacity_tokens=100)
    with door.permit(60), pytest.raises(RequestError) as refused, door.permit(10) as permit:
        permit.correct(50)
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s == 1.0
    assert door.held_tokens == 0


def test_a_request_that_never_fits_is_refused_for_good_and_not_sent_to_try_again() -> None:
    door = Door(capacity_tokens=100)
    with door.permit(5000) as permit, pytest.raises(RequestError, match=r"101 tokens, .*--max-queue-tokens.*parts") as e:
        permit.correct(101)
    assert (e.value.code, e.value.retry_after_s) == ("too_long", None)
    assert door.held_tokens == 0


def test_an_estimate_alone_refuses_nobody_for_good() -> None:
    """Ids written in JSON have more bytes than an estimate allows for."""
    door = Door(capacity_tokens=100)
    with door.permit(5000) as permit:
        permit.correct(100)
        assert door.held_tokens == 100


def test_a_permit_is_given_back_whatever_happens_and_once() -> None:
    door = Door(capacity_tokens=100)
    with pytest.raises(KeyError), door.permit(60):
        raise KeyError
    with door.permit(60) as permit:
        permit.__exit__()
    assert door.held_tokens == 0


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[list[Trunk], bool]]:
    """Requests of prompts with several responses, and whether the caller goes away."""
    sizes = st.lists(st.lists(st.integers(0, 60), min_size=0, max_size=5), min_size=0, max_size=5)
    asked = draw(st.lists(st.tuples(sizes, st.integers(1, 50), st.booleans()), min_size=1, max_size=12))
    return [
        ([trunk(100 * r + i, *lengths, prompt_tokens=prompt) for i, lengths in enumerate(request)], leaves)
        for r, (request, prompt, leaves) in enumerate(asked)
    ]


@settings(deadline=None, max_examples=60)
@given(load=loads(), room_tokens=st.integers(110, 300), budget_tokens=st.integers(1, 200))
def test_whatever_is_asked_everybody_who_stays_gets_the_right_answer(
    load: list[tuple[list[Trunk], bool]], room_tokens: int, budget_tokens: int
) -> None:
    engine = Recorder(Memory(room_tokens))

    async def ask() -> list[Computed | BaseException]:
        async with running(engine, max_batch_tokens=budget_tokens) as batcher:
            tasks = [submitted(batcher.submit(request, Wants())) for request, _ in load]
            await asyncio.sleep(0)
            for task, (_, leaves) in zip(tasks, load, strict=True):
                if leaves:
                    task.cancel()
            return await soon(asyncio.gather(*tasks, return_exceptions=True))

    for computed, (request, leaves) in zip(asyncio.run(ask()), load, strict=True):
        if isinstance(computed, Computed):
            assert_named(computed, request)
        else:
            assert leaves
            assert isinstance(computed, asyncio.CancelledError)
    for tokens, batch in zip(engine.batch_tokens, engine.batches, strict=True):
        assert tokens <= budget_tokens or (len(batch) == 1 and len(batch[0].branches) <= 1)
