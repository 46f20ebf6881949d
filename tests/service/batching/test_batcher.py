"""The batcher: every caller gets its own scores, and every batch keeps its budget."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pytest
from batcher_harness import BUDGET_TOKENS, OneEngine, assert_named, held_by, running, soon, submitted
from dense_reward.batching.batcher import Computed
from dense_reward.engines.fake import FakeEngine
from dense_reward.errors import RequestError
from dense_reward.records import Cost, EngineInfo, TeacherScores, TokenScores, Trunk, Wants, Work
from dense_reward.telemetry.metrics import Metrics, MetricsSnapshot
from faulty_engines import INFO, Gate, Memory, Recorder, packed, padded, trunk, unlike
from hypothesis import given, settings
from hypothesis import strategies as st


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


def test_a_batch_counts_a_shared_prompt_once_and_the_seconds_of_the_device_alone() -> None:
    metrics, preparing_s = Metrics(), 0.05
    prepared_at: list[float] = []

    def preparing(_: Sequence[Trunk]) -> None:
        time.sleep(preparing_s)
        prepared_at.append(time.perf_counter())

    async def ask() -> list[Computed]:
        batcher = OneEngine(
            Recorder(preparing=preparing), metrics, max_batch_tokens=BUDGET_TOKENS, max_queue_tokens=1000
        )
        asked = [submitted(batcher.submit([trunk(1, 10, prompt_tokens=60)], Wants())) for _ in range(2)]
        await asyncio.sleep(0)
        loop = submitted(batcher.run())
        answers = await soon(asyncio.gather(*asked))
        batcher.close()
        await soon(loop)
        return answers

    answers = asyncio.run(ask())
    rendered = metrics.render(MetricsSnapshot(True, 0, 0.0, {}, {})).decode()
    assert "dense_reward_batch_tokens_sum 80.0" in rendered
    batch_s = float(rendered.split("dense_reward_batch_seconds_sum ")[1].split()[0])
    for computed in answers:
        assert computed.queue_s >= preparing_s
        assert computed.compute_s == pytest.approx(batch_s)
    assert batch_s <= time.perf_counter() - prepared_at[0], "preparation does not count as device time"


def test_a_caller_that_goes_away_takes_its_waiting_work_with_it() -> None:
    gate = Gate()
    engine = Recorder(gate)

    async def ask() -> Computed:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(1, 3), trunk(1, 97), trunk(1, 97)], Wants()))
            await held_by(gate, first)
            gone = submitted(batcher.submit(unlike(50, 2, 3), Wants()))
            stays = submitted(batcher.submit(unlike(3, 3, 30), Wants()))
            await held_by(gate, first, gone, stays)
            gone.cancel()
            first.cancel()
            await asyncio.sleep(0)
            gate.opened.set()
            return await soon(stays)

    assert_named(asyncio.run(ask()), unlike(3, 3, 30))
    assert [[int(t.prompt_P[0]) for t in batch] for batch in engine.batches] == [[1], [3, 3, 3]]


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


def test_nobody_gets_what_only_a_batch_mate_asked_for() -> None:
    """Otherwise an answer would depend on other requests, and a NaN in one of them would fail all of them."""
    gate = Gate()
    engine = Recorder(gate)
    asked = [
        Wants(),
        Wants(kl=True),
        Wants(entropy=True),
        Wants(varentropy=True),
        Wants(top_k=2),
        Wants(top_k=5),
        Wants(True, True, 1),
    ]

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(0, 97)], Wants()))
            await held_by(gate, first)
            tasks = [submitted(batcher.submit([trunk(1, 3, 2)], wants)) for wants in asked]
            await held_by(gate, *tasks)
            gate.opened.set()
            return await soon(asyncio.gather(*tasks))

    answers = asyncio.run(ask())
    assert engine.wants == [Wants(), Wants(kl=True, entropy=True, varentropy=True, top_k=5)]
    for wants, computed in zip(asked, answers, strict=True):
        for scores in computed.scores[0]:
            assert (scores.kl_S is not None) == wants.kl
            assert (scores.entropy_S is not None) == wants.entropy
            assert (scores.varentropy_S is not None) == wants.varentropy
            for array in (scores.top_ids_SK, scores.top_sft_logprob_SK, scores.top_reference_logprob_SK):
                assert (0 if array is None else array.shape[1]) == wants.top_k


@dataclass(frozen=True, slots=True)
class Everything:
    """Fills every field for one branch of three tokens."""

    info: EngineInfo = INFO

    def cost(self, trunk: Trunk) -> Cost:
        return packed(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        row, table = np.zeros(3, np.float32), np.zeros((3, 2), np.float32)
        ids = table.astype(np.int32)
        teacher = TeacherScores(row, row.astype(np.int32), ids, table, table, 0, 0.0)
        return lambda: [[TokenScores(row, row, row, row, table, table, ids, table, table, row, row, teacher)]]


def test_every_field_of_the_scores_is_handed_on() -> None:
    async def ask() -> Computed:
        async with running(Everything()) as batcher:
            return await soon(batcher.submit([trunk(1, 3)], Wants(True, True, 2, True)))

    scores = asyncio.run(ask()).scores[0][0]
    assert all(getattr(scores, field.name) is not None for field in fields(TokenScores))


def test_batches_are_filled_by_what_the_engine_computes_and_not_by_what_was_sent() -> None:
    """An engine that computes the prompt again for each branch."""
    engine = Recorder(cost=padded)
    group, single = trunk(1, *([2] * 12), prompt_tokens=30), trunk(2, 5, prompt_tokens=30)

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            assert batcher.cost_tokens([group, single]) == 12 * 32 + 35
            return await soon(asyncio.gather(*(batcher.submit(asked, Wants()) for asked in ([group], [single] * 4))))

    spread, together = asyncio.run(ask())
    assert_named(spread, [group])
    assert_named(together, [single] * 4)
    assert max(sum(engine.cost(t).tokens for t in batch) for batch in engine.batches) <= BUDGET_TOKENS
    assert {len(t.branches) for batch in engine.batches for t in batch if t.prompt_P[0] == 1} == {3}


def test_a_request_without_trunks_is_answered_at_once() -> None:
    async def ask() -> Computed:
        async with running(Recorder()) as batcher:
            return await soon(batcher.submit([], Wants()))

    assert asyncio.run(ask()) == Computed([], 0.0, 0.0)


def test_the_time_of_waiting_and_the_time_of_computing_are_told_apart() -> None:
    gate, held_s = Gate(), 0.05

    async def ask() -> tuple[Computed, float]:
        async with running(Recorder(gate)) as batcher:
            first = submitted(batcher.submit([trunk(1, 97)], Wants()))
            await held_by(gate, first)
            second = submitted(batcher.submit([trunk(2, 3)], Wants()))
            await held_by(gate, first, second)
            await asyncio.sleep(held_s)
            opened_at = time.perf_counter()
            gate.opened.set()
            return await soon(second), time.perf_counter() - opened_at

    computed, since_opened_s = asyncio.run(ask())
    assert computed.queue_s >= held_s
    assert 0 < computed.compute_s <= since_opened_s


def test_closing_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    gate = Gate()

    async def ask() -> list[Computed]:
        batcher = OneEngine(Recorder(gate), Metrics(), max_batch_tokens=BUDGET_TOKENS, max_queue_tokens=1000)
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


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[list[Trunk], bool]]:
    """Requests of prompts with several responses, and whether the caller is cancelled."""
    sizes = st.lists(st.lists(st.integers(0, 60), min_size=0, max_size=5), min_size=0, max_size=5)
    asked = draw(st.lists(st.tuples(sizes, st.integers(1, 50), st.booleans()), min_size=1, max_size=12))
    return [
        ([trunk(100 * r + i, *lengths, prompt_tokens=prompt) for i, lengths in enumerate(request)], leaves)
        for r, (request, prompt, leaves) in enumerate(asked)
    ]


@settings(deadline=None, max_examples=60)
@given(load=loads(), room_tokens=st.integers(110, 300), budget_tokens=st.integers(1, 200), late=st.booleans())
def test_whatever_is_asked_everybody_who_stays_gets_the_right_answer(
    load: list[tuple[list[Trunk], bool]], room_tokens: int, budget_tokens: int, late: bool
) -> None:
    """`late`: batches are launched behind others, and fail only when their scores should arrive."""
    memory = Memory(room_tokens)
    engine = Recorder(collecting=memory) if late else Recorder(memory)

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
