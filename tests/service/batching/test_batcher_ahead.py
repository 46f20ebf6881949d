"""Preparing ahead: the next batch is prepared while the device computes, only if full, for callers that still wait."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import pytest
from batcher_harness import BUDGET_TOKENS, OneEngine, assert_named, held_by, running, soon, submitted
from dense_reward.batching.batcher import Computed
from dense_reward.errors import EngineLostError, OutOfMemoryError, RequestError
from dense_reward.records import Trunk, Wants
from dense_reward.telemetry.metrics import Metrics
from faulty_engines import PATIENCE_S, Gate, Memory, Recorder, trunk

FULL = BUDGET_TOKENS - 2  # tokens of a branch that fills a batch with its prompt


@dataclass(slots=True)
class Held:
    """An engine whose device stays busy with the batch named 0. `seen` is set when the batch named 1 is prepared.

    `fails` is raised if batch 1 is prepared while the device is held.
    """

    fails: Exception | None = None
    gate: Gate = field(default_factory=Gate)
    seen: threading.Event = field(default_factory=threading.Event)
    engine: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Recorder(self.gate, self._preparing)

    def _preparing(self, trunks: Sequence[Trunk]) -> None:
        if any(one.prompt_P[0] == 1 for one in trunks):
            self.seen.set()
            if self.fails is not None and not self.gate.opened.is_set():
                raise self.fails

    async def first(self, batcher: OneEngine) -> "asyncio.Task[Computed]":
        """The request that holds the device."""
        first = submitted(batcher.submit([trunk(0, 3)], Wants()))
        await held_by(self.gate, first)
        return first

    async def prepared(self) -> None:
        """Returns once batch 1 was prepared and the event loop has its outcome."""
        assert await asyncio.to_thread(self.seen.wait, PATIENCE_S)
        await asyncio.sleep(0.05)


def run_held(held: Held, ask: Callable[[OneEngine], Coroutine[object, object, None]]) -> None:
    async def run() -> None:
        async with running(held.engine) as batcher:
            await ask(batcher)

    asyncio.run(run())


def test_a_full_batch_is_prepared_while_the_device_computes_another() -> None:
    held = Held()

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        second = submitted(batcher.submit([trunk(1, FULL)], Wants()))
        await held.prepared()
        assert not held.gate.opened.is_set()
        assert len(held.engine.batches) == 1
        third = submitted(batcher.submit([trunk(2, FULL)], Wants()))
        held.gate.opened.set()
        for task, name in ((first, 0), (second, 1), (third, 2)):
            assert_named(await soon(task), [trunk(name, 3 if name == 0 else FULL)])

    run_held(held, ask)
    assert held.engine.prepared == held.engine.batches
    assert held.engine.names == [[0], [1], [2]]


def test_batches_are_prepared_on_one_thread_and_computed_on_another() -> None:
    threads: list[str] = []

    def note(_: Sequence[Trunk]) -> None:
        threads.append(threading.current_thread().name)

    async def ask() -> None:
        async with running(Recorder(note, note)) as batcher:
            await soon(batcher.submit([trunk(1, FULL)], Wants()))

    asyncio.run(ask())
    assert threads == ["prepare_0", "device_0"]


def test_a_batch_that_is_not_full_is_left_to_grow() -> None:
    held = Held()

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        second = submitted(batcher.submit([trunk(1, 60)], Wants()))
        await held_by(held.gate, first, second)
        third = submitted(batcher.submit([trunk(2, 10)], Wants()))
        await held_by(held.gate, first, second, third)
        held.gate.opened.set()
        await soon(asyncio.gather(first, second, third))

    run_held(held, ask)
    assert held.engine.names == [[0], [1, 2]]


def test_no_more_than_one_batch_is_prepared_ahead() -> None:
    held = Held()

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        rest = submitted(batcher.submit([trunk(n, FULL) for n in (1, 2, 3)], Wants()))
        await held.prepared()
        late = submitted(batcher.submit([trunk(4, 3)], Wants()))
        await held_by(held.gate, first, rest, late)
        held.gate.opened.set()
        await soon(asyncio.gather(first, rest, late))

    run_held(held, ask)
    assert held.engine.names == [[0], [1], [4], [2], [3]]
    assert held.engine.prepared == held.engine.batches


def test_a_prepared_batch_whose_callers_all_left_is_not_computed() -> None:
    held = Held()

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        gone = [submitted(batcher.submit([trunk(name, 47)], Wants())) for name in (1, 3, 4)]
        await held.prepared()
        stays = submitted(batcher.submit([trunk(2, 3)], Wants()))
        await held_by(held.gate, first, stays, *gone)
        for task in gone:
            task.cancel()
        held.gate.opened.set()
        await soon(asyncio.gather(first, stays))

    run_held(held, ask)
    assert held.engine.names == [[0], [2]]
    assert [int(batch[0].prompt_P[0]) for batch in held.engine.prepared] == [0, 1, 2]


def test_a_prepared_batch_that_some_callers_left_is_prepared_again_without_them() -> None:
    held = Held()

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        gone = submitted(batcher.submit([trunk(1, 40)], Wants(kl=True)))
        stays = submitted(batcher.submit([trunk(2, 56)], Wants()))
        await held.prepared()
        gone.cancel()
        held.gate.opened.set()
        await soon(first)
        assert_named(await soon(stays), [trunk(2, 56)])

    run_held(held, ask)
    assert held.engine.names == [[0], [2]]
    assert [[int(one.prompt_P[0]) for one in batch] for batch in held.engine.prepared] == [[0], [1, 2], [2]]
    assert held.engine.wants == [Wants(), Wants()]


def test_a_caller_that_leaves_while_its_batch_is_being_prepared_is_not_computed() -> None:
    preparing = Gate()
    engine = Recorder(preparing=preparing)

    async def ask() -> None:
        async with running(engine) as batcher:
            gone = submitted(batcher.submit([trunk(1, 3)], Wants()))
            stays = submitted(batcher.submit([trunk(2, 3)], Wants()))
            await held_by(preparing, gone, stays)
            gone.cancel()
            preparing.opened.set()
            assert_named(await soon(stays), [trunk(2, 3)])

    asyncio.run(ask())
    assert engine.names == [[2]]


def test_a_failure_ahead_reaches_its_own_callers_and_neither_those_before_nor_after() -> None:
    held = Held(RuntimeError("no such kernel"))

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        failed = [submitted(batcher.submit([trunk(n, 47)], Wants())) for n in (1, 2)]
        after = submitted(batcher.submit([trunk(3, 3)], Wants()))
        await held.prepared()
        await held_by(held.gate, first, after)
        held.gate.opened.set()
        assert_named(await soon(first), [trunk(0, 3)])
        answers = await soon(asyncio.gather(*failed, return_exceptions=True))
        assert [str(answer) for answer in answers] == ["no such kernel"] * 2
        assert_named(await soon(after), [trunk(3, 3)])

    run_held(held, ask)
    assert held.engine.names == [[0], [3]]


def test_a_caller_that_leaves_takes_the_failure_of_what_was_prepared_with_it_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = Held(RuntimeError("no such kernel"))

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        gone = submitted(batcher.submit([trunk(1, 40)], Wants()))
        stays = submitted(batcher.submit([trunk(2, 56)], Wants()))
        await held.prepared()
        gone.cancel()
        held.gate.opened.set()
        await soon(first)
        assert_named(await soon(stays), [trunk(2, 56)])

    run_held(held, ask)
    gc.collect()  # asyncio logs an exception that was never retrieved when its future is freed
    assert held.engine.names == [[0], [2]]
    assert not caplog.records


def test_what_had_no_room_ahead_is_let_go_before_it_is_tried_again() -> None:
    held, memory = Held(), Memory(room_tokens=10)
    note = held.engine.preparing

    def preparing(trunks: Sequence[Trunk]) -> None:
        try:
            memory(trunks)
        finally:
            note(trunks)

    async def ask(batcher: OneEngine) -> None:
        held.engine.preparing = preparing
        first = await held.first(batcher)
        second = submitted(batcher.submit([trunk(1, FULL)], Wants()))
        await held.prepared()
        memory.room_tokens = BUDGET_TOKENS
        held.gate.opened.set()
        await soon(asyncio.gather(first, second))

    run_held(held, ask)
    assert len(memory.lost) == 1
    assert not memory.still_held


def test_a_sequence_for_which_there_was_no_room_beside_another_batch_is_tried_again_alone() -> None:
    held = Held(OutOfMemoryError("no room"))

    async def ask(batcher: OneEngine) -> None:
        first = await held.first(batcher)
        second = submitted(batcher.submit([trunk(1, FULL)], Wants()))
        await held.prepared()
        held.gate.opened.set()
        await soon(first)
        assert_named(await soon(second), [trunk(1, FULL)])

    run_held(held, ask)
    assert held.engine.names == [[0], [1]]


def test_a_full_batch_is_launched_behind_another_whose_scores_are_still_awaited() -> None:
    gate, launched = Gate(), threading.Event()

    def before(trunks: Sequence[Trunk]) -> None:
        if trunks[0].prompt_P[0] == 1:
            launched.set()

    engine = Recorder(before, collecting=gate)

    async def ask() -> None:
        async with running(engine) as batcher:
            first = submitted(batcher.submit([trunk(0, 3)], Wants()))
            await held_by(gate, first)
            second = submitted(batcher.submit([trunk(1, FULL)], Wants()))
            assert await asyncio.to_thread(launched.wait, PATIENCE_S)
            third = submitted(batcher.submit([trunk(2, FULL)], Wants()))
            await held_by(gate, first, second, third)
            assert [int(batch[0].prompt_P[0]) for batch in engine.prepared] == [0, 1]
            gate.opened.set()
            for task, name in ((first, 0), (second, 1), (third, 2)):
                computed = await soon(task)
                assert_named(computed, [trunk(name, 3 if name == 0 else FULL)])
                assert computed.compute_s > 0

    asyncio.run(ask())
    assert engine.names == [[0], [1], [2]]


def test_a_device_that_is_lost_under_one_batch_still_gives_the_scores_of_the_batch_before() -> None:
    gate = Gate()

    def before(trunks: Sequence[Trunk]) -> None:
        if trunks[0].prompt_P[0] == 1:
            gate.opened.set()
            raise EngineLostError("CUDA error")

    engine = Recorder(before, collecting=gate)

    async def ask() -> list[Computed | BaseException | None]:
        batcher = OneEngine(engine, Metrics(), max_batch_tokens=BUDGET_TOKENS, max_queue_tokens=1000)
        loop = submitted(batcher.run())
        first = submitted(batcher.submit([trunk(0, 3)], Wants()))
        await held_by(gate, first)
        others = [submitted(batcher.submit([trunk(n, FULL)], Wants())) for n in (1, 2)]
        return list(await soon(asyncio.gather(loop, first, *others, return_exceptions=True)))

    ended, first, second, third = asyncio.run(ask())
    assert isinstance(ended, EngineLostError)
    assert isinstance(first, Computed)
    assert isinstance(second, EngineLostError)
    assert isinstance(third, RequestError)
    assert engine.names == [[0], [1]]


Ends = Callable[["asyncio.Task[None]", Held], object]
ENDINGS: dict[str, tuple[Ends, type[BaseException], Exception | None]] = {
    "cancelled": (lambda loop, held: loop.cancel(), asyncio.CancelledError, None),
    "cancelled after a failure ahead": (lambda loop, held: loop.cancel(), asyncio.CancelledError, RuntimeError("x")),
    "lost ahead": (lambda loop, held: held.gate.opened.set(), EngineLostError, EngineLostError("CUDA error")),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_queue_that_ends_with_a_batch_prepared_ahead_leaves_nobody_waiting(
    ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    end, error, fails = ENDINGS[ending]
    held = Held(fails)

    async def ask() -> list[Computed | BaseException | None]:
        batcher = OneEngine(held.engine, Metrics(), max_batch_tokens=BUDGET_TOKENS, max_queue_tokens=1000)
        loop = submitted(batcher.run())
        first = await held.first(batcher)
        others = [submitted(batcher.submit([trunk(n, FULL)], Wants())) for n in (1, 2)]
        await held.prepared()
        end(loop, held)
        answers = await soon(asyncio.gather(loop, first, *others, return_exceptions=True))
        held.gate.opened.set()
        return list(answers)

    ended, first, second, third = asyncio.run(ask())
    assert isinstance(ended, error)
    assert isinstance(first, Computed) == (ending == "lost ahead")
    assert isinstance(second, EngineLostError if ending == "lost ahead" else RequestError)
    assert isinstance(third, RequestError)
    assert third.code == "draining"
    del ended, first, second, third
    gc.collect()  # asyncio logs an exception that was never retrieved when its future is freed
    assert not caplog.records
