"""Parallel tasks: results in the order of completion, and processes that end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import failing_jobs
import pytest
from dense_reward_trainer.runs.processes import TERMINATED, in_processes
from failing_jobs import PATIENCE_S, fail_beside, started_in

pytestmark = pytest.mark.slow


def square(number: int) -> int:
    return number * number


def ends(process_id: int) -> bool:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_every_item_has_its_result() -> None:
    assert sorted(in_processes(2, square, [1, 2, 3, 4, 5])) == [1, 4, 9, 16, 25]


def test_a_failure_ends_the_others_and_what_they_started_and_begins_nothing_new(tmp_path: Path) -> None:
    names = ["sleeps", "fails", "queued", "queued_too"]
    with pytest.raises(ValueError, match="this one fails"):
        list(in_processes(2, fail_beside, [tmp_path / name for name in names]))
    assert ends(started_in(tmp_path / "sleeps"))
    for begun in tmp_path.glob("queued*/child"):  # started by the failed worker, before the pool was shut down
        assert ends(int(begun.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_forked_jobs_end_with_the_process_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(failing_jobs.__file__).parent)!r})
from dense_reward_trainer.runs.processes import exit_on_sigterm, in_processes
from failing_jobs import fork_and_wait
if __name__ == "__main__":
    exit_on_sigterm()
    list(in_processes(1, fork_and_wait, [Path({str(tmp_path)!r}) / "forks"]))
"""
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py")]) as parent:
        child = started_in(tmp_path / "forks")
        parent.send_signal(number)
        parent.wait(PATIENCE_S)
    assert ends(child)


def test_a_job_that_is_terminated_ends_what_it_started(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(failing_jobs.__file__).parent)!r})
from dense_reward_trainer.runs.processes import exit_on_sigterm, in_processes
from failing_jobs import fail_beside
if __name__ == "__main__":
    exit_on_sigterm()
    list(in_processes(1, fail_beside, [Path({str(tmp_path)!r}) / name for name in ("sleeps", "queued", "queued_too")]))
"""
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py")]) as parent:
        child = started_in(tmp_path / "sleeps")
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(PATIENCE_S) == TERMINATED
    assert ends(child)
    assert not [*tmp_path.glob("queued*")]


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
@pytest.mark.parametrize(
    ("ending", "code"),
    [("return 0", 0), ("return 2", 2), ("sys.exit(143)", 143), ("sys.exit()", 0), ("raise ValueError('why')", 1)],
)
def test_a_process_of_a_launch_runs_its_exit_handlers_but_does_not_finalise_the_interpreter(
    launched: bool, ending: str, code: int
) -> None:
    script = f"""
import atexit, sys
from dense_reward_trainer.runs.processes import exits_with
class Finalised:
    def __del__(self):
        print("finalised")
kept = Finalised()
kept.itself = kept
def main():
    atexit.register(print, "handled")
    print("done", end=" ")
    {ending}
exits_with(main)
"""
    variables = {name: value for name, value in os.environ.items() if name != "RANK"}
    if launched:
        variables["RANK"] = "1"
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["done", "handled"] + ["finalised"] * (not launched)
    assert ("ValueError: why" in done.stderr) == (code == 1)
