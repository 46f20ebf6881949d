"""Bulk scoring on Ray Data itself: two local workers give the rows of a run without Ray, also if one is killed.

Runs in an environment with Ray (`make test-frameworks`).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="needs Ray: make test-frameworks")

from bulk_runs import TERMS, a_job, run_fake, sums_file  # noqa: E402 - after the skip
from dense_reward.bulk.job import Job, opened  # noqa: E402
from dense_reward.bulk.ray_data import Workers, score_with_ray  # noqa: E402
from dense_reward.settings import read_settings  # noqa: E402
from ray_workers import workers  # noqa: E402

ROWS = 3000


@pytest.fixture(autouse=True)
def _ray_ends() -> Iterator[None]:
    """Ray installs its own handler of SIGTERM, and leaves it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


def run_ray(job: Job) -> None:
    with opened(job, lambda rows, tokens: None) as writer:
        score_with_ray(writer, read_settings({"engine": "fake"}, ()), TERMS, Workers(2, None, None))


@pytest.mark.parametrize("kills", [0, 1])
def test_two_workers_write_the_rows_of_one_process(tmp_path: Path, kills: int) -> None:
    file = sums_file(tmp_path, ROWS)
    run_fake(a_job(file, tmp_path / "local.jsonl"))
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray.jsonl", killed))
    if kills:
        killer.start()
    run_ray(a_job(file, tmp_path / "ray.jsonl"))
    if kills:
        killer.join()
    assert len(killed) == kills
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kills one of this process's actors once rows were written."""
    while not out.exists() or out.stat().st_size == 0:
        time.sleep(0.02)
    process = next(workers(b"MapWorker(MapBatches(Worker))"), None)
    if process is not None:
        os.kill(process, signal.SIGKILL)
        killed.append(process)
