"""A full disk ends a job with one sentence and costs no state: the run goes on once there is space.

A limit on the size of files stands for the disk: writes beyond it fail in the same way.
"""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from dense_reward.errors import CheckpointError
from dense_reward.manifest import load_manifest
from dense_reward_trainer.cli import main
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.full_disk import is_full_disk, reports_full_disk
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.sft.from_scratch import train_tokenizer
from limited_files import no_file_beyond, set_limit, unchanged_limit
from safetensors.torch import save_file

LIMIT_BYTES = 150_000
"""The tiny run's weights are smaller, the state of its optimiser is larger."""


def write_plainly(path: Path) -> None:
    path.write_bytes(bytes(2 * LIMIT_BYTES))


def write_state(path: Path) -> None:
    torch.save({"weights": torch.zeros(LIMIT_BYTES)}, path)


def write_weights(path: Path) -> None:
    save_file({"weights": torch.zeros(LIMIT_BYTES)}, path)


def write_tokenizer(path: Path) -> None:
    set_limit(2_000)
    train_tokenizer(["Add 12 and 34."], 300).save_pretrained(path)


def written_with_little_space(write: Callable[[Path], None], folder: Path) -> None:
    with no_file_beyond(LIMIT_BYTES), reports_full_disk(folder / "run" / "not yet there"):
        write(folder / "file")


@pytest.mark.parametrize("write", [write_plainly, write_state, write_weights, write_tokenizer])
def test_a_write_that_finds_no_space_is_recognised(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(JobError, match=r"MB are free\): make space and start the same command again"):
        written_with_little_space(write, tmp_path)


def test_the_reason_is_found_below_other_errors() -> None:
    error = CheckpointError("cannot be written")
    assert not is_full_disk(error)
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_full_disk(error)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("a"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), reports_full_disk(Path()):
        raise error


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_state_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sft(folder: Path) -> int:
        steps = ["threads=1", "save_every_steps=5", "log_every_steps=1"]
        return main(["sft", "arithmetic_sft_tiny", f"output_dir={folder}", *steps])

    def limited_after(log: MetricsLog, step: int, values: Mapping[str, float | None]) -> None:
        append(log, step, values)
        if step == 7:
            set_limit(LIMIT_BYTES)

    append = MetricsLog.append
    with monkeypatch.context() as patched, unchanged_limit():
        patched.setattr(MetricsLog, "append", limited_after)
        assert sft(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "a file could not be written completely" in error
    assert "Traceback" not in error
    assert (tmp_path / "run" / "resume" / "checkpoint-5" / "trainer_state.json").is_file()
    assert load_manifest(tmp_path / "run" / "checkpoints" / "reference").optimiser_step == 10
    assert sft(tmp_path / "run") == 0
    assert "resumed at step 5" in capsys.readouterr().err
    assert sft(tmp_path / "unbroken") == 0
    weights = {load_manifest(tmp_path / run / "checkpoints" / "sft").weights_sha256 for run in ("run", "unbroken")}
    assert len(weights) == 1
