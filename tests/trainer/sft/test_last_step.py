"""A run that is killed after its last step, before its last checkpoint is whole, trains no further step."""

import json
from pathlib import Path

import pytest
from dense_reward.manifest import load_manifest
from dense_reward_trainer.cli import main
from dense_reward_trainer.selfplay.checkpoint_writer import RoundWriter
from dense_reward_trainer.sft.checkpoint_writer import SaveMilestones

pytestmark = pytest.mark.slow

# The learning rate is not 0 at the end, and the last step is not the last one of an epoch.
SHORT = ("threads=1", "log_every_steps=1", "schedule=constant_with_warmup", "device=cpu")
SFT = ("sft", "arithmetic_sft_tiny", "max_steps=3", "eval_every_steps=null", *SHORT)
ROUND = ("irft", "arithmetic_irft_tiny", "rounds=1", "steps=3", "beta=0.1", "learning_rate=1.0e-4", *SHORT)


def weights(folder: Path) -> str:
    return load_manifest(folder / "checkpoints" / "sft").weights_sha256


def steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def ended_before_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, writer: type, name: str, command: tuple[str, ...]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, name, stop)
        assert main([*command]) == 130


@pytest.mark.parametrize("by_length", ["true", "false"])
def test_sft_ends_with_the_weights_of_its_last_step(
    by_length: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*SFT, f"group_by_length={by_length}")
    assert main([*command, f"output_dir={tmp_path / 'unbroken'}"]) == 0
    killed = (*command, f"output_dir={tmp_path / 'killed'}")
    ended_before_the_last_checkpoint(monkeypatch, SaveMilestones, "write_sft", killed)
    assert main([*killed]) == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")
    assert steps(tmp_path / "killed") == steps(tmp_path / "unbroken") == [1, 2, 3]


def test_a_round_of_self_play_ends_with_the_weights_of_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*SFT, f"output_dir={tmp_path / 'start'}"]) == 0
    command = (*ROUND, f"policy={tmp_path / 'start' / 'checkpoints' / 'sft'}")
    assert main([*command, f"output_dir={tmp_path / 'unbroken'}"]) == 0
    killed = (*command, f"output_dir={tmp_path / 'killed'}")
    ended_before_the_last_checkpoint(monkeypatch, RoundWriter, "write", killed)
    assert main([*killed]) == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")
    assert steps(tmp_path / "killed") == steps(tmp_path / "unbroken") == [1, 2, 3]
