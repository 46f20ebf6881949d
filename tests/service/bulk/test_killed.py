"""The command as a process that is killed: no row is lost, none is doubled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bulk_runs import rows_of, sums_file
from dense_reward.bulk.run_state import state_of
from dense_reward.settings import ENV_PREFIX

pytestmark = pytest.mark.slow
ROWS, MANY_ROWS = 3000, 60_000
SLOWLY = "from dense_reward.engines.fake import FakeEngine as F; import time; ours = F.prepare; "
SLOWLY += "F.prepare = lambda *batch: time.sleep(0.05) or ours(*batch); "
"""However fast the machine is, a run takes a minute, which is long enough for a busy one to send a signal."""
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""A shell starts what runs in the background with SIGINT ignored, also these tests and what they start."""
SOON = "from dense_reward.bulk import job; job.SYNC_S = 0.0; job.WINDOW_ROWS = 50; import sys; "
MAIN = "from dense_reward.cli import main; sys.exit(main())"


def started(file: Path, out: Path, *options: str, before: str = SOON) -> "subprocess.Popen[str]":
    program = HEARS + before + MAIN
    command = [sys.executable, "-c", program, "score", str(file), "--out", str(out), "--engine", "fake", *options]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_three_kills_lose_and_double_no_row(tmp_path: Path, suffix: str) -> None:
    file, out, growing = sums_file(tmp_path, ROWS), tmp_path / f"out.{suffix}", tmp_path / "out.jsonl"
    parts, killed = tmp_path / "out.parquet.parts", 0
    while killed < 3:
        process = started(file, out, before=SOON + SLOWLY)
        before = size(growing, parts)
        while process.poll() is None and size(growing, parts) <= before + 2:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: give it more rows"
        killed += 1
    process = started(file, out)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{ROWS} rows, {ROWS} responses" in output
    assert output.splitlines()[-1] == f"next: dense-reward stats {out}"
    assert numbers(out) == list(range(ROWS))


@pytest.mark.parametrize(("sent", "suffix"), [(signal.SIGINT, "jsonl"), (signal.SIGTERM, "parquet")], ids=str)
def test_a_signal_saves_what_was_scored(tmp_path: Path, sent: signal.Signals, suffix: str) -> None:
    file, out, growing = sums_file(tmp_path, MANY_ROWS), tmp_path / f"out.{suffix}", tmp_path / "out.jsonl"
    process = started(file, out, before=SOON + SLOWLY)
    while process.poll() is None and size(growing, tmp_path / "out.parquet.parts") <= 2:
        time.sleep(0.005)
    process.send_signal(sent)
    _, errors = process.communicate()
    assert process.returncode == 128 + sent
    assert errors.splitlines()[-1] == "dense-reward: interrupted: the same command goes on after the saved rows"
    assert "Traceback" not in errors
    assert "rror" not in errors
    state = state_of(out)
    assert state is not None
    assert 0 < state.rows < MANY_ROWS


def test_ctrl_c_does_not_wait_for_libraries(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True)\nwhile True: time.sleep(0.1)\n")
    file, out = sums_file(tmp_path, 1), tmp_path / "out.jsonl"
    fake = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    process = started(file, out, "--engine", "torch", "--sft", "a", "--reference", "b", before=fake)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)  # without end before
    finally:
        process.kill()
    assert process.returncode in {-signal.SIGINT, 128 + signal.SIGINT}
    assert errors.splitlines()[-1] == "dense-reward: interrupted: the same command goes on after the saved rows"


def test_what_runs_in_the_background_ends_when_told(tmp_path: Path) -> None:
    """A shell starts it with SIGINT ignored."""
    file, out = sums_file(tmp_path, MANY_ROWS), tmp_path / "out.jsonl"
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    process = started(file, out, before=ignoring + SOON + SLOWLY)
    while process.poll() is None and size(out, tmp_path) <= 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "dense-reward: interrupted: the same command goes on after the saved rows"
    state = state_of(out)
    assert state is not None
    assert 0 < state.rows < MANY_ROWS


def size(growing: Path, parts: Path) -> int:
    """Grows with what is written: kibibytes of JSONL, or parts of Parquet."""
    return growing.stat().st_size // 1024 if growing.exists() else len([*parts.glob("0*")])


def numbers(out: Path) -> list[int]:
    if out.suffix == ".jsonl":
        return [row["row"] for row in rows_of(out)]
    import pyarrow.parquet as pq  # noqa: PLC0415

    found: list[int] = pq.read_table(out, columns=["row"]).column("row").to_pylist()
    return found


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, MANY_ROWS), tmp_path / "out.jsonl"
    first = started(file, out, before=SOON + SLOWLY)
    while not out.exists():
        time.sleep(0.01)
    second = started(file, out)
    _, errors = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"another process writes {out}" in errors
