"""Tasks for processes: one fails, the others start a child process that sleeps."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from dense_reward_trainer.runs.processes import end_with_parent, started

PATIENCE_S = 60.0
SLEEPER = "import time; time.sleep(600)"


def fail_beside(folder: Path) -> None:
    """In a folder `fails`: fails once the task in `sleeps` has a child. In others: starts a child and writes its id."""
    if folder.name == "fails":
        started_in(folder.parent / "sleeps")
        raise ValueError("this one fails")
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as child:
        try:
            (folder / "child.tmp").write_text(str(child.pid))
            (folder / "child.tmp").rename(folder / "child")
            child.wait()
        finally:
            child.terminate()


def fork_and_wait(folder: Path) -> None:
    """Forks a job, as a cell of a study does, which writes its process id and sleeps."""
    folder.mkdir()
    job = multiprocessing.get_context("fork").Process(target=_sleep, args=(folder,))
    with started(job):
        job.join()


def _sleep(folder: Path) -> None:
    end_with_parent()
    (folder / "child.tmp").write_text(str(os.getpid()))
    (folder / "child.tmp").rename(folder / "child")
    time.sleep(600)


def started_in(folder: Path) -> int:
    """Id of the child process that was written to the folder. Waits for it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (folder / "child").exists():
        assert time.monotonic() < deadline_s, "nothing was started"
        time.sleep(0.05)
    return int((folder / "child").read_text())
