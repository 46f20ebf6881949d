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
    """Kills one of this process's actors once rows were written; other clusters on the machine are left alone."""
    while not out.exists() or out.stat().st_size == 0:
        time.sleep(0.02)
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_worker = b"MapWorker(MapBatches(Worker))" in command.read_bytes()
        except OSError:
            continue
        if is_worker and os.getpid() in ancestors(int(command.parent.name)):
            os.kill(int(command.parent.name), signal.SIGKILL)
            killed.append(int(command.parent.name))
            return


def ancestors(process: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found: list[int] = []
    while process > 1:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(process)
    return found
