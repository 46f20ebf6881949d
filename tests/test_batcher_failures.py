"""A batch that fails, an engine that forgets, memory that runs out: each caller hears of it, and nobody else."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from dense_reward.batcher import Computed
from dense_reward.engine.base import EngineInfo, TokenScores, Trunk, Wants
from dense_reward.errors import RequestError
from queued import assert_named, running, soon
from unruly_engines import INFO, Memory, Recorder, named_scores, trunk


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
    info: EngineInfo = INFO

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
