"""One job at a time in a run folder, also after a kill, without files left behind."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.folder_lock import LOCK_NAME, only_job_in
from dense_reward_trainer.runs.processes import is_first_process, is_first_to_say
from dense_reward_trainer.studies.regimes.config import SweepConfig

HOLDER = """
import os, sys, time
from pathlib import Path
from dense_reward_trainer.runs.folder_lock import only_job_in
with only_job_in(Path(sys.argv[1]), print):
    if sys.argv[2:] != ["fork"] or not os.fork():  # the child speaks: it has started then
        print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def said() -> list[str]:
    return []


def holder(folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Another process that holds the folder; with the option fork, it has a child."""
    command = [sys.executable, "-c", HOLDER, str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    return process


def test_a_second_process_is_refused_in_words_until_the_first_is_killed(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "runs" / "run"
    with holder(folder) as first:
        try:
            with (
                pytest.raises(JobError, match=rf"another process works in this folder \(pid {first.pid}, started 2"),
                only_job_in(folder, said.append),
            ):
                pass
            assert (folder / LOCK_NAME).exists(), "the first one still holds it"
        finally:
            first.send_signal(signal.SIGKILL)
    with only_job_in(folder, said.append):
        assert json.loads((folder / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not said


def test_a_folder_that_stays_empty_is_removed_and_results_are_kept(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "runs" / "run"
    with only_job_in(folder, said.append):
        pass
    assert not folder.parent.exists()
    with only_job_in(folder, said.append):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_that_was_there_is_kept(tmp_path: Path, said: list[str]) -> None:
    with only_job_in(tmp_path, said.append):
        pass
    assert tmp_path.is_dir()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_job_in(tmp_path, said.append):
        pass
    assert [text for text in said if "file system without locks" in text] == said != []


def test_other_processes_of_a_launch_do_not_ask_for_the_lock(tmp_path: Path, said: list[str]) -> None:
    with only_job_in(tmp_path, said.append, {"RANK": "0"}), only_job_in(tmp_path, said.append, {"RANK": "1"}):
        pass
    assert not is_first_process({"RANK": "1"})


def test_a_child_of_a_killed_process_does_not_hold_the_folder(tmp_path: Path, said: list[str]) -> None:
    with holder(tmp_path, "fork") as first:
        try:
            first.send_signal(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL
            with only_job_in(tmp_path, said.append):
                pass
        finally:
            os.killpg(first.pid, signal.SIGKILL)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"), only_job_in(tmp_path / "file" / "run", said.append):
        pass


def test_the_command_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as first:
        try:
            assert main(["sft", "arithmetic_sft_tiny", f"output_dir={tmp_path}"]) == 2
            words = capsys.readouterr().err
            assert words.startswith(f"error: {tmp_path}: another process works in this folder")
            assert words.count("\n") == 1
        finally:
            first.kill()


@pytest.mark.parametrize("finished_only", [False, True])
def test_a_sweep_that_only_reports_may_look_at_a_running_one(tmp_path: Path, finished_only: bool) -> None:
    overrides = [f"output_dir={tmp_path}", f"finished_only={finished_only}"]
    assert load_config(SweepConfig, config_path("figures_sweep"), overrides).reads_only is finished_only


def test_processes_of_one_launch_say_the_same_thing_once(tmp_path: Path) -> None:
    ranks = [{"TORCHELASTIC_ERROR_FILE": str(tmp_path / str(rank) / "error.json")} for rank in range(3)]
    assert [is_first_to_say("a key is unknown", rank) for rank in ranks] == [True, False, False]
    assert [is_first_to_say(f"only {rank} sees this", ranks[rank]) for rank in (1, 2)] == [True, True]
    assert [is_first_to_say("a key is unknown", variables) for variables in ({}, {"TORCHELASTIC_ERROR_FILE": ""})] == [
        True,
        True,
    ]
    gone = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "gone" / "0" / "error.json")}
    assert is_first_to_say("a key is unknown", gone), "said twice is better than not at all"
