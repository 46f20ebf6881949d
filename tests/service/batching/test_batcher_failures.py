"""Failures: a batch, an engine, memory. Each caller of the failed batch gets the error, and no other caller does."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
from batcher_harness import OneEngine, assert_named, held_by, running, soon, submitted
from dense_reward.batching.batcher import Computed
from dense_reward.errors import EngineLostError, RequestError, SequenceError
from dense_reward.records import Cost, EngineInfo, Scores, TokenScores, Trunk, Wants, Work
from dense_reward.telemetry.metrics import Metrics
from faulty_engines import INFO, Gate, Memory, Recorder, SmallDevice, named_scores, packed, trunk

Stage = Literal["prepared", "computed"]
at_both_stages = pytest.mark.parametrize("stage", get_args(Stage))


def engine_with(stage: Stage, fault: Callable[[Sequence[Trunk]], None]) -> Recorder:
    """An engine with a fault at the stage where a batch is prepared, or where it is computed."""
    return Recorder(preparing=fault) if stage == "prepared" else Recorder(before=fault)


def fail_on(name: int, error: Exception) -> Callable[[Sequence[Trunk]], None]:
    def fail(trunks: Sequence[Trunk]) -> None:
        if any(t.prompt_P[0] == name for t in trunks):
            raise error

    return fail


@at_both_stages
def test_a_batch_that_fails_reaches_each_of_its_callers_and_nobody_else(stage: Stage) -> None:
    engine = engine_with(stage, fail_on(2, RuntimeError("device lost")))

    async def ask() -> tuple[list[Computed | BaseException], Computed]:
        async with running(engine) as batcher:
            together = await soon(
                asyncio.gather(*(batcher.submit([trunk(n, 3)], Wants()) for n in (1, 2, 3)), return_exceptions=True)
            )
            return together, await soon(batcher.submit([trunk(4, 3)], Wants()))

    together, later = asyncio.run(ask())
    assert [str(answer) for answer in together] == ["device lost"] * 3
    assert_named(later, [trunk(4, 3)])


@at_both_stages
def test_a_sequence_that_an_engine_does_not_compute_fails_its_own_request_alone(stage: Stage) -> None:
    engine = engine_with(stage, fail_on(2, SequenceError("not this one")))

    async def ask() -> list[Computed | BaseException]:
        async with running(engine) as batcher:
            asked = (batcher.submit([trunk(n, 3)], Wants()) for n in (1, 2, 3))
            return await soon(asyncio.gather(*asked, return_exceptions=True))

    before, failed, after = asyncio.run(ask())
    assert isinstance(failed, SequenceError)
    assert str(failed) == "not this one"
    for answer, name in ((before, 1), (after, 3)):
        assert isinstance(answer, Computed)
        assert_named(answer, [trunk(name, 3)])


@at_both_stages
def test_what_is_left_of_a_failed_request_is_not_computed(stage: Stage) -> None:
    engine = engine_with(stage, fail_on(2, RuntimeError("device lost")))

    async def ask() -> None:
        async with running(engine) as batcher:
            with pytest.raises(RuntimeError, match="device lost"):
                await soon(batcher.submit([trunk(2, 97) for _ in range(100)], Wants()))

    asyncio.run(ask())
    assert len(engine.batches) == (stage == "computed")


def without_its_last_token(scores: TokenScores) -> TokenScores:
    return TokenScores(scores.sft_logprob_S[:-1], scores.reference_logprob_S[:-1])


LOSSES: dict[str, Callable[[Scores], Scores]] = {
    "a branch": lambda scores: [*scores[:-1], scores[-1][:-1]],
    "a trunk": lambda scores: scores[:-1],
    "a token": lambda scores: [[without_its_last_token(score) for score in branches] for branches in scores],
    "everything": lambda scores: [[None for _ in branches] for branches in scores],  # type: ignore[misc]
}


@dataclass(frozen=True, slots=True)
class Forgetful:
    """An engine that omits part of every answer with a trunk named 1 or 2."""

    lost: str
    info: EngineInfo = INFO

    def cost(self, trunk: Trunk) -> Cost:
        return packed(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        scores = named_scores(trunks, wants)
        return lambda: LOSSES[self.lost](scores) if any(t.prompt_P[0] < 3 for t in trunks) else scores


@pytest.mark.parametrize("lost", LOSSES)
def test_an_engine_that_loses_part_of_its_answer_mixes_up_nobody_and_stops_nothing(lost: str) -> None:
    async def ask() -> tuple[list[Computed | BaseException], Computed]:
        async with running(Forgetful(lost)) as batcher:
            broken = await soon(
                asyncio.gather(*(batcher.submit([trunk(n, 3, 4)], Wants()) for n in (1, 2)), return_exceptions=True)
            )
            return broken, await soon(batcher.submit([trunk(3, 3, 4)], Wants()))

    broken, later = asyncio.run(ask())
    for answer in broken:
        assert isinstance(answer, AttributeError if lost == "everything" else RuntimeError)
    assert_named(later, [trunk(3, 3, 4)])


class Ending:
    """A batcher whose loop ends before it was closed, with two requests in it: one being computed, one waiting."""

    def __init__(self, engine: Recorder, gate: Gate) -> None:
        self.batcher = OneEngine(engine, Metrics(), max_batch_tokens=10, max_queue_tokens=1000)
        self.loop = submitted(self.batcher.run())
        self.computed = submitted(self.batcher.submit([trunk(1, 8)], Wants()))
        self.waiting = submitted(self.batcher.submit([trunk(2, 8)], Wants()))
        self.gate = gate

    async def answers(self, end: Callable[["asyncio.Task[None]"], object]) -> list[object]:
        """The outcomes of the loop, of both requests, and of one that comes later."""
        await held_by(self.gate, self.computed, self.waiting)
        end(self.loop)
        self.gate.opened.set()
        asked = self.loop, self.computed, self.waiting
        answers: list[object] = list(await soon(asyncio.gather(*asked, return_exceptions=True)))
        with pytest.raises(RequestError) as refused:
            await soon(self.batcher.submit([trunk(3, 1)], Wants()))
        return [*answers, refused.value]


@at_both_stages
def test_a_device_that_is_lost_ends_the_queue_and_every_caller_hears_of_it(stage: Stage) -> None:
    gate, error = Gate(), EngineLostError("CUDA error: an illegal memory access")

    def before(trunks: Sequence[Trunk]) -> None:
        gate(trunks)
        raise error

    async def ask() -> list[object]:
        return await Ending(engine_with(stage, before), gate).answers(lambda _: None)

    loop, computed, *others = asyncio.run(ask())
    assert (loop, computed) == (error, error)
    for other in others:
        assert isinstance(other, RequestError)
        assert (other.code, other.retry_after_s is not None) == ("draining", True)


@at_both_stages
def test_a_queue_that_is_cancelled_leaves_nobody_waiting(stage: Stage) -> None:
    gate = Gate()

    async def ask() -> list[object]:
        return await Ending(engine_with(stage, gate), gate).answers(lambda loop: loop.cancel())

    loop, *others = asyncio.run(ask())
    assert isinstance(loop, asyncio.CancelledError)
    for other in others:
        assert isinstance(other, RequestError)
        assert other.code == "draining"


@at_both_stages
def test_a_batch_that_does_not_fit_into_memory_is_split_until_it_does(stage: Stage) -> None:
    memory = Memory(room_tokens=21)
    engine = engine_with(stage, memory)
    requests = [[trunk(n, 5, 0, 9, 1), trunk(n + 50, 12), trunk(n + 70, 19)] for n in range(5)]

    async def ask() -> list[Computed]:
        async with running(engine) as batcher:
            return await soon(asyncio.gather(*(batcher.submit(request, Wants()) for request in requests)))

    for request, computed in zip(requests, asyncio.run(ask()), strict=True):
        assert_named(computed, request)
    assert memory.lost


@at_both_stages
def test_what_a_failed_batch_held_on_the_device_is_let_go_before_its_halves_are_tried(stage: Stage) -> None:
    memory = Memory(room_tokens=10)

    async def ask() -> None:
        async with running(engine_with(stage, memory)) as batcher:
            await soon(batcher.submit([trunk(n, 4, 4, 4) for n in range(4)], Wants()))

    asyncio.run(ask())
    assert len(memory.lost) > 3
    assert not memory.still_held


def test_what_was_prepared_for_a_failed_batch_is_let_go_before_its_halves_are_prepared() -> None:
    engine = SmallDevice(room_tokens=10)

    async def ask() -> None:
        async with running(engine) as batcher:
            for _ in range(30):
                await soon(batcher.submit([trunk(n, 4, 4, 4) for n in range(4)], Wants()))

    asyncio.run(ask())
    assert len(engine.lost) > 90
    assert not engine.still_held


@at_both_stages
def test_only_a_sequence_that_fails_alone_fails(stage: Stage) -> None:
    engine = engine_with(stage, Memory(room_tokens=30))

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
