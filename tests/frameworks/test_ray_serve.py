"""The example on Ray Serve itself: two replicas of a real pair, of which one is killed while it answers.

Runs in an environment with Ray (`make test-frameworks`).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

ray = pytest.importorskip("ray", reason="needs Ray: make test-frameworks")
serve = pytest.importorskip("ray.serve", reason="needs ray[serve]: make test-frameworks")

from dense_reward import Backoff, Client  # noqa: E402 - after the skip
from ray_workers import workers  # noqa: E402
from served_pair import free_port, write_pair  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLERS, REQUESTS = 8, 20
REPLICA = b"ServeReplica:default:Rewards"
PATIENCE_S = 300.0


class Statuses(httpx2.HTTPTransport):
    """Records the status of every answer, also of those that the client retries."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self.seen: list[int] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        self.seen.append(response.status_code)
        return response


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas behind Ray Serve's proxy. Ray installs its own handler of SIGTERM, and leaves it."""
    pair, port = tmp_path_factory.mktemp("pair"), free_port()
    write_pair(pair)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from ray_serve import app  # noqa: PLC0415 - the example, by the path that its users give

        own = {"working_dir": str(EXAMPLES)}  # as `serve run --working-dir` has it
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning", runtime_env=own)
        serve.start(http_options={"port": port})
        serve.run(app({"replicas": "2", "threads": "1", **{role: str(pair / role) for role in ("sft", "reference")}}))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


def test_the_first_request_finds_a_pair_that_is_loaded(url: str) -> None:
    answer = httpx2.post(f"{url}/score", json={"prompt": "1+1=", "response": "2"}, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert len(list(workers(REPLICA))) == 2


def test_a_replica_that_is_killed_under_load_costs_no_request(
    url: str, record_property: Callable[[str, object], None]
) -> None:
    """Callers keep two replicas busy; one gets SIGKILL, and Ray Serve starts another in its place."""
    before = set(workers(REPLICA))
    answered, statuses = threading.Semaphore(0), Statuses()

    def ask(caller: int) -> list[NDArray[np.float32]]:
        found = []
        with Client(url, backoff=Backoff(0.1, 1.0), transport=statuses) as client:
            for number in range(REQUESTS):
                found.append(rewards(client, caller, number))
                answered.release()
        return found

    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(ask, caller) for caller in range(CALLERS)]
        for _ in range(CALLERS * REQUESTS // 4):
            assert answered.acquire(timeout=PATIENCE_S)
        os.kill(min(before), signal.SIGKILL)
        found = [one.result(PATIENCE_S) for one in running]
    with Client(url) as client:
        for caller, number in product(range(CALLERS), range(REQUESTS)):
            np.testing.assert_allclose(found[caller][number], rewards(client, caller, number), atol=1e-4)
    record_property("ray_serve_requests", CALLERS * REQUESTS)
    record_property("ray_serve_retried", len(statuses.seen) - CALLERS * REQUESTS)
    assert set(statuses.seen) <= {200, 500, 503}
    end = time.monotonic() + PATIENCE_S
    while len(now := set(workers(REPLICA))) < 2:
        assert time.monotonic() < end, "Ray Serve started no other replica"
        time.sleep(0.2)
    assert now != before


def rewards(client: Client, caller: int, number: int) -> NDArray[np.float32]:
    """The rewards of eight responses: enough work that a kill finds requests in flight."""
    responses = [[10 + number, 8 + response, *range(20, 80)] for response in range(8)]
    return np.stack([np.asarray(result.reward) for result in client.score_ids([5, 6 + caller], responses).results])
