"""The cache of scores: cached entries, computations in flight, and who can share them."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from dense_reward.records import Branch, Scores, TokenScores, Trunk, Wants
from dense_reward.scoring.score_cache import ENTRY_BYTES, Scope, ScoreCache, keys_of
from dense_reward.telemetry.metrics import Metrics
from faulty_engines import Gate, Recorder, named_scores, trunk
from running_service import PATIENCE_S, loading, served, wait_until
from tiny_models import random_trunk

SCOPE = Scope("revision", None)


class Computing:
    """Computes named scores, and records the prompts of its calls. `wait` delays or fails it."""

    def __init__(self, wait: Callable[[], Coroutine[object, object, object]] = lambda: asyncio.sleep(0)) -> None:
        self.asked: list[list[int]] = []
        self.wait = wait

    async def __call__(self, trunks: Sequence[Trunk]) -> Scores:
        self.asked.append([int(one.prompt_P[0]) for one in trunks])
        await self.wait()
        return named_scores(trunks, Wants())


def names(scores: Scores) -> list[float]:
    return [float(branches[0].sft_logprob_S[0]) for branches in scores]


async def scores_of(cache: ScoreCache, computing: Computing, *prompts: int) -> list[float]:
    trunks = [trunk(name, 3) for name in prompts]
    return names(await cache.get_or_compute(keys_of(trunks, Wants(), SCOPE), trunks, computing))


def test_what_was_computed_is_kept_and_what_is_missing_is_computed_at_once() -> None:
    computing = Computing()

    async def ask() -> None:
        cache = ScoreCache(1_000_000, Metrics())
        assert await scores_of(cache, computing, 1, 2, 1) == [1, 2, 1]
        assert await scores_of(cache, computing, 3, 2, 4, 1) == [3, 2, 4, 1]

    asyncio.run(ask())
    assert computing.asked == [[1, 2], [3, 4]]


class CountedKey(bytes):
    """A key that counts how often keys are hashed."""

    hashed = 0

    def __hash__(self) -> int:
        CountedKey.hashed += 1
        return super().__hash__()


def test_the_work_on_the_event_loop_grows_with_the_number_of_trunks_and_not_with_its_square() -> None:
    """4,096 trunks once stopped every caller for a second, and took 600 MB."""
    many = 500

    async def ask() -> int:
        cache, computing = ScoreCache(0, Metrics()), Computing(lambda: asyncio.sleep(0.01))
        trunks = [trunk(name, 1) for name in range(many)]
        keys = [CountedKey(key) for key in keys_of(trunks, Wants(), SCOPE)]
        CountedKey.hashed = 0
        both = (cache.get_or_compute(keys, trunks, computing) for _ in range(2))
        await asyncio.gather(*both)  # the second joins the first
        assert len(computing.asked) == 1
        return CountedKey.hashed

    assert asyncio.run(ask()) < 100 * many


def test_what_was_not_asked_for_longest_goes_first_and_memory_is_bounded() -> None:
    computing = Computing()
    entry_bytes = 2 * ENTRY_BYTES + 2 * 3 * 4

    async def ask() -> None:
        cache = ScoreCache(3 * entry_bytes, Metrics())
        for name in (1, 2, 3, 1, 4, 1, 2):
            await scores_of(cache, computing, name)
            assert cache.kept_bytes <= 3 * entry_bytes
        assert cache.kept_bytes == 3 * entry_bytes

    asyncio.run(ask())
    assert computing.asked == [[1], [2], [3], [4], [2]]


def test_without_memory_nothing_is_kept() -> None:
    computing = Computing()

    async def ask() -> None:
        cache = ScoreCache(0, Metrics())
        for _ in range(2):
            await scores_of(cache, computing, 1)
        assert cache.kept_bytes == 0

    asyncio.run(ask())
    assert computing.asked == [[1], [1]]


def test_what_is_being_computed_is_waited_for() -> None:
    async def ask() -> None:
        opened = asyncio.Event()
        computing, cache = Computing(opened.wait), ScoreCache(0, Metrics())
        first = asyncio.create_task(scores_of(cache, computing, 1, 2))
        await asyncio.sleep(0)
        others = [asyncio.create_task(scores_of(cache, computing, *asked)) for asked in ((2, 1), (3, 1, 2), (1, 2))]
        for _ in range(5):
            await asyncio.sleep(0)
        opened.set()
        assert await asyncio.gather(first, *others) == [[1, 2], [2, 1], [3, 1, 2], [1, 2]]
        assert computing.asked == [[1, 2], [3]]

    asyncio.run(ask())


@pytest.mark.parametrize("end", ["fails", "leaves"])
def test_where_whoever_computes_ends_those_who_wait_ask_anew(end: str) -> None:
    async def ask() -> None:
        opened = asyncio.Event()

        async def fail() -> None:
            await opened.wait()
            raise ValueError("broken")

        cache, broken, sound = ScoreCache(0, Metrics()), Computing(fail), Computing(lambda: asyncio.sleep(0.05))
        first = asyncio.create_task(scores_of(cache, broken, 1))
        await asyncio.sleep(0)
        others = [asyncio.create_task(scores_of(cache, sound, 1, 2)) for _ in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        opened.set() if end == "fails" else first.cancel()
        assert await asyncio.gather(*others) == [[1, 2]] * 3
        with pytest.raises(ValueError, match="broken") if end == "fails" else pytest.raises(asyncio.CancelledError):
            await first
        assert sum(asked.count(1) for asked in sound.asked) == 1

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("asked", "bulk", "joins"), [((1, 2, 3), True, True), ((1, 2, 3), False, False), ((1,), True, False)]
)
def test_nobody_waits_for_what_others_ask_besides_or_for_bulk(asked: tuple[int, ...], bulk: bool, joins: bool) -> None:
    async def ask() -> None:
        opened = asyncio.Event()
        slow, quick, cache = Computing(opened.wait), Computing(), ScoreCache(0, Metrics())

        async def of(computing: Computing, *prompts: int, bulk: bool) -> Scores:
            trunks = [trunk(name, 3) for name in prompts]
            return await cache.get_or_compute(keys_of(trunks, Wants(), SCOPE), trunks, computing, bulk=bulk)

        first = asyncio.create_task(of(slow, 1, 2, bulk=True))
        await asyncio.sleep(0)
        second = asyncio.create_task(of(quick, *asked, bulk=bulk))
        for _ in range(5):
            await asyncio.sleep(0)
        assert second.done() is not joins
        opened.set()
        assert names(await second) == list(asked)
        assert names(await first) == [1, 2]
        assert quick.asked == [[3] if joins else list(asked)]

    asyncio.run(ask())


def test_kept_scores_keep_nothing_else() -> None:
    """An engine returns views of its batch's arrays."""
    batch = np.zeros(1_000_000, dtype=np.float32)

    async def compute(_: Sequence[Trunk]) -> Scores:
        return [[TokenScores(batch[:3], batch[3:6])]]

    async def ask() -> None:
        cache, trunks = ScoreCache(10_000, Metrics()), [trunk(1, 3)]
        for _ in range(2):
            scores = await cache.get_or_compute(keys_of(trunks, Wants(), SCOPE), trunks, compute)
        assert scores[0][0].sft_logprob_S.base is None

    asyncio.run(ask())


def test_two_who_wait_for_each_other_both_get_an_answer() -> None:
    async def ask() -> None:
        computing, cache = Computing(), ScoreCache(0, Metrics())
        both = (scores_of(cache, computing, *asked) for asked in ((1, 2), (2, 3, 1)))
        assert await asyncio.gather(*both) == [[1, 2], [2, 3, 1]]

    asyncio.run(ask())


def test_a_key_differs_with_everything_that_a_number_depends_on() -> None:
    one = random_trunk(0, 5, (3, 4), k=2)
    branch = one.branches[0]
    candidates = branch.candidates_SK
    assert candidates is not None
    unscored = branch.scored_T.copy()
    unscored[0] = not unscored[0]
    others = [
        Trunk(one.prompt_P[:-1], one.branches),
        Trunk(np.append(one.prompt_P, branch.ids_T[0]), one.branches),
        Trunk(one.prompt_P, one.branches[:1]),
        Trunk(one.prompt_P, one.branches[::-1]),
        Trunk(one.prompt_P, (Branch(branch.ids_T, unscored, candidates), one.branches[1])),
        Trunk(one.prompt_P, (Branch(branch.ids_T, branch.scored_T), one.branches[1])),
        Trunk(one.prompt_P, (Branch(branch.ids_T, branch.scored_T, candidates[:, ::-1]), one.branches[1])),
    ]
    wants = [Wants(kl=True), Wants(entropy=True), Wants(varentropy=True), Wants(top_k=1)]
    keys = keys_of([one, *others], Wants(), SCOPE)
    keys += [keys_of([one], asked, SCOPE)[0] for asked in wants]
    keys += [keys_of([one], Wants(), scope)[0] for scope in (Scope("other", None), Scope("revision", "group"))]
    assert len(set(keys)) == len(keys)
    assert keys_of([random_trunk(0, 5, (3, 4), k=2)], Wants(), SCOPE) == keys[:1]


BODY = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]]}


def test_a_service_answers_what_it_knows_without_its_device() -> None:
    engine = Recorder()
    with served(loading(engine), results_bytes=1_000_000) as running:
        answers = [running.score(BODY | more).json()["results"] for more in ({}, {}, {"signal": "sft_logprob"})]
        assert answers[0] == answers[1]
        assert len(engine.batches) == 1
        running.score(BODY | {"include": ["kl"]})
        assert len(engine.batches) == 2
        rendered = running.client.get("/metrics").text
    assert 'dense_reward_reused_tokens_total{how="kept"} 10.0' in rendered


def test_equal_requests_in_flight_are_computed_once() -> None:
    gate = Gate()
    engine = Recorder(gate)
    with served(loading(engine)) as running, ThreadPoolExecutor(4) as pool:
        first = pool.submit(running.score, BODY)
        wait_until(gate.entered.is_set)
        others = [pool.submit(running.score, BODY) for _ in range(3)]
        wait_until(lambda: running.service.batcher.admission.held_tokens == 4 * 5)
        gate.opened.set()
        rows = [answer.result(PATIENCE_S).json()["results"] for answer in (first, *others)]
        assert 'in_flight"} 15.0' in running.client.get("/metrics").text
    assert rows == [rows[0]] * 4
    assert len(engine.batches) == 1


@pytest.mark.parametrize("isolated", [False, True])
def test_keys_share_nothing_where_the_setting_says_so(tmp_path: Path, isolated: bool) -> None:
    holders = ["key-of-a-caller-1", "key-of-a-caller-2"]
    (tmp_path / "keys.json").write_text(json.dumps([{"name": key[-1], "key": key} for key in holders]))
    gate = Gate()
    engine = Recorder(gate)
    files = {"api_keys_file": tmp_path / "keys.json"}
    with (
        served(loading(engine), ready=True, results_bytes=1_000_000, isolate_keys=isolated, **files) as running,
        ThreadPoolExecutor(3) as pool,
    ):

        def ask(holder: int, body: object) -> httpx2.Response:
            headers = {"Authorization": f"Bearer {holders[holder]}"}
            return running.client.post("/score", json=body, headers=headers)

        first = pool.submit(ask, 0, BODY)
        wait_until(gate.entered.is_set)
        prompt = {"prompt_ids": [7] * 9}
        later = [pool.submit(ask, holder, prompt | {"response_ids": [[holder]]}) for holder in (0, 1)]
        wait_until(lambda: running.service.batcher.admission.held_tokens == 5 + 2 * 10)
        gate.opened.set()
        assert {answer.result(PATIENCE_S).status_code for answer in (first, *later)} == {200}
        ask(1, BODY)
    assert [len(batch) for batch in engine.prepared] == ([1, 1, 1, 1] if isolated else [1, 2])
