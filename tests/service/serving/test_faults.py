"""Faults around a service: clocks that jump, headers of any bytes, slow loading, cancelled callers. A real server."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from dense_reward.batching.worker_threads import WorkerThreads
from dense_reward.engines.fake import FakeEngine
from dense_reward.records import OnDevice, Trunk
from dense_reward.serving.loaders import LoadedPair
from dense_reward.serving.service import Service
from dense_reward.settings import Settings, read_settings
from faulty_engines import Gate, Recorder
from running_service import PATIENCE_S, loading, served, wait_until

IDS = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]]}


def test_a_clock_that_jumps_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    jump_s = 0.0
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
    with served(loading(Recorder(gate)), max_request_s=20.0) as running, ThreadPoolExecutor(1) as pool:
        for change_s in (1e8, -1e8):
            waiting = pool.submit(running.client.post, "/score", json=IDS, headers={"X-Request-Timeout": "10"})
            wait_until(gate.entered.is_set)
            jump_s += change_s
            gate.opened.set()
            answer = waiting.result(PATIENCE_S)
            assert answer.status_code == 200
            assert all(0 <= seconds < PATIENCE_S for seconds in answer.json()["timing"].values())
            gate.entered.clear()
            gate.opened.clear()


@pytest.mark.parametrize("header", ["Basic \xe9\xe9", "Bearer \xff", "\xff \xff"])
def test_a_head_of_any_bytes_causes_no_internal_error(header: str) -> None:
    with served() as running:
        host, port = running.client.base_url.host, running.client.base_url.port or 0
        with socket.create_connection((host, port), timeout=PATIENCE_S) as caller:
            sent = f"GET /admin/models HTTP/1.1\r\nHost: a\r\nAuthorization: {header}\r\nConnection: close\r\n\r\n"
            caller.sendall(sent.encode("latin-1"))
            assert caller.recv(12) in {b"HTTP/1.1 403", b"HTTP/1.1 401"}


def test_a_timeout_inside_the_work_is_not_reported_as_the_callers_deadline() -> None:
    def before(_: Sequence[Trunk]) -> None:
        raise TimeoutError("a file system")

    with served(loading(Recorder(before))) as running:
        answer = running.score(IDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")


@pytest.mark.parametrize("step", ["in a step", "between two steps"])
def test_a_service_that_is_stopped_while_it_loads_has_not_failed(step: str) -> None:
    gate = Gate()

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        gate(())
        if step == "in a step":
            report("the next step")
        else:
            on_device(lambda: None)
        return loading(FakeEngine())(settings, report, on_device)

    async def live() -> Service:
        service = Service(read_settings({}, ()), load, lambda: None)
        service.start()
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.1)
        gate.opened.set()
        await asyncio.wait_for(stopping, PATIENCE_S)
        return service

    service = asyncio.run(live())
    assert (service.state, service.is_busy) == ("draining", False)


def test_loading_that_outlasts_the_drain_time_does_not_keep_the_service_from_stopping() -> None:
    gate = Gate()

    def load(_: Settings, __: Callable[[str], None], ___: OnDevice) -> LoadedPair:
        gate(())
        raise AssertionError

    async def live() -> Service:
        service = Service(read_settings({"drain_s": "1"}, ()), load, lambda: None)
        service.start()
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        await asyncio.wait_for(service.stop(), PATIENCE_S)
        assert service.is_busy
        gate.opened.set()
        return service

    assert asyncio.run(live()).state == "draining"


def test_a_cancelled_caller_also_cancels_its_calls_that_wait_for_a_thread() -> None:
    gate = Gate()
    begun: list[int] = []

    async def run() -> None:
        threads = WorkerThreads(1, "test")
        first = asyncio.create_task(threads.run(gate, ()))
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        others = [asyncio.create_task(threads.run(begun.append, n)) for n in range(5)]
        await asyncio.sleep(0)
        for other in others[:4]:
            other.cancel()
        first.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.wait_for(others[4], PATIENCE_S)
        threads.shutdown()

    asyncio.run(run())
    assert begun == [4]


def test_a_short_request_does_not_wait_for_a_long_one_that_scores_the_same_and_more() -> None:
    """Its scores are computed again: joining the long request would delay it."""
    items = [{"prompt_ids": [n], "response_ids": [[1] * 30]} for n in range(20)]
    allowed = threading.Semaphore(4)  # batches that may be computed

    def before(_: Sequence[Trunk]) -> None:
        assert allowed.acquire(timeout=PATIENCE_S)

    engine = Recorder(before)
    with served(loading(engine), max_batch_tokens=32) as running, ThreadPoolExecutor(2) as pool:
        admission = running.service.batcher.admission
        long = pool.submit(running.client.post, "/score", json={"items": items, "priority": "bulk"})
        wait_until(lambda: len(engine.batches) == 5)
        short = pool.submit(running.score, items[0])
        wait_until(lambda: admission.held_tokens == 31 * (len(items) + 1))
        allowed.release(
            3
        )  # three batches: the one that waits in the engine, the next one, which is already prepared, and the short one
        assert short.result(PATIENCE_S).status_code == 200
        assert not long.done()
        allowed.release(len(items))
        assert long.result(PATIENCE_S).status_code == 200


def test_waiting_for_the_same_scores_of_another_request_counts_as_time_in_the_queue() -> None:
    gate = Gate()
    with served(loading(Recorder(gate))) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        second = pool.submit(running.score, IDS)
        wait_until(lambda: running.service.batcher.admission.held_tokens == 10)
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        timing = second.result(PATIENCE_S).json()["timing"]
    assert timing["queue_s"] > 0
    assert timing["compute_s"] == 0.0
