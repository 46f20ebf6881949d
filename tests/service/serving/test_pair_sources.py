"""The pairs of an SFT run: one for each reference, in the order of the run; anything unclear is refused in words."""

import json
from pathlib import Path

import pytest
from dense_reward.cli import main
from dense_reward.errors import CheckpointError, SettingsError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Role
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.settings import Settings, env_name


def write(checkpoint: Path, role: Role, step: int | None) -> None:
    """A manifest; which pairs a run has is decided without its weights."""
    manifest: dict[str, object] = {
        "role": role,
        "run_id": "run",
        "optimiser_step": step,
        "renderer": "plain",
        "end_of_turn_id": None,
        "vocabulary": 1,
        "tokenizer_sha256": "",
        "template_sha256": "",
        "dtype": "float32",
        "files": {},
        "probe": [],
        "created_at": "",
    }
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three references whose steps are in another order than their names."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for name, step in (("a-reference", 10), ("base", 0), ("early", 2)):
        write(checkpoints / name, "reference", step)
    write(checkpoints / "sft", "sft", 20)
    return tmp_path / "run"


def pairs(folder: Path, **settings: object) -> list[Settings]:
    return first_pairs(Settings.model_validate({"run": folder, **settings}))


@pytest.mark.parametrize("named", [".", "checkpoints"])
def test_a_run_gives_a_pair_for_each_reference_the_earliest_first(run: Path, named: str) -> None:
    checkpoints = run / "checkpoints"
    found = pairs(run / named, max_items=7)
    assert [pair.name for pair in found] == ["base", "early", "a-reference"]
    assert [pair.reference for pair in found] == [checkpoints / pair.name for pair in found]
    assert {(pair.sft, pair.max_items) for pair in found} == {(checkpoints / "sft", 7)}


def test_what_is_no_reference_gives_no_pair_and_an_unknown_step_comes_last(run: Path) -> None:
    checkpoints = run / "checkpoints"
    write(checkpoints / "policy", "policy", 30)
    write(checkpoints / "adopted", "reference", None)
    (checkpoints / ".base.partial").mkdir()
    (checkpoints / "notes.txt").touch()
    assert [pair.name for pair in pairs(run)] == ["base", "early", "a-reference", "adopted"]


def remove(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    folder.rmdir()


def test_a_folder_without_a_run_is_refused_with_what_to_name(run: Path) -> None:
    with pytest.raises(SettingsError, match="no such folder: name the output_dir"):
        pairs(run / "another")
    with pytest.raises(SettingsError, match="is a checkpoint: name the folder of its run"):
        pairs(run / "checkpoints" / "base")
    remove(run / "checkpoints" / "sft")
    with pytest.raises(SettingsError, match=r"no finished sft checkpoint .* the same command resumes it"):
        pairs(run)


def test_a_run_without_a_reference_is_told_how_to_get_one(run: Path) -> None:
    for name in ("a-reference", "base", "early"):
        remove(run / "checkpoints" / name)
    with pytest.raises(
        SettingsError, match=r"holds no reference: adopt .* --role reference --run-id run --out \S+base"
    ):
        pairs(run)


@pytest.mark.parametrize("name", ["sft", "early"])
def test_an_incomplete_checkpoint_is_refused(run: Path, name: str) -> None:
    (run / "checkpoints" / name / MANIFEST_NAME).unlink()
    with pytest.raises(SettingsError, match=rf"{name} has no manifest\.json, so it is no complete checkpoint"):
        pairs(run)
    (run / "checkpoints" / name / MANIFEST_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a manifest"):
        pairs(run)


def test_a_name_that_no_request_could_use_is_refused(run: Path) -> None:
    write(run / "checkpoints" / "half way", "reference", 5)
    with pytest.raises(SettingsError, match=r"cannot be that of a pair .* rename it"):
        pairs(run)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sft": "a", "reference": "b"}, "either --pairs-file, or --run, or --sft and --reference"),
        ({"reference": "b"}, "either --pairs-file, or --run, or --sft and --reference"),
        ({"pairs_file": "a"}, "either --pairs-file, or --run, or --sft and --reference"),
        ({"engine": "remote"}, "serves one pair: replace --run by"),
        ({"name": "mine"}, "leave out --name"),
    ],
)
def test_a_run_is_not_combined_with_what_contradicts_it(run: Path, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        pairs(run, **settings)


def test_the_command_line_and_the_environment_name_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", f"--run={tmp_path}"]) == 2
    monkeypatch.setenv(env_name("run"), str(tmp_path))
    assert main(["serve"]) == 2
    assert main(["check"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == second == third
    assert "holds no finished sft checkpoint" in first
