"""The command `score`: what an earlier output may cost, and what it holds."""

from pathlib import Path

import pytest
from bulk_runs import Json, sums_file, write_rows
from dense_reward.cli import main


def scored(tmp_path: Path) -> tuple[Path, Path]:
    file, out = sums_file(tmp_path, 3), tmp_path / "out.jsonl"
    assert main(["score", str(file), "--out", str(out), "--engine", "fake"]) == 0
    return file, out


def test_an_output_stays_if_there_is_nothing_to_score_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = scored(tmp_path)
    before = out.read_bytes()
    missing = ["--sft", str(tmp_path / "none"), "--reference", str(tmp_path / "none")]
    assert main(["score", str(file), "--out", str(out), "--overwrite", *missing]) != 0
    assert out.read_bytes() == before
    assert main(["score", str(file), "--out", str(out), "--overwrite", "--engine", "fake"]) == 0
    assert out.read_bytes() == before
    assert "Traceback" not in capsys.readouterr().err


def test_a_complete_output_of_other_options_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = scored(tmp_path)
    before = out.read_bytes()
    again = ["score", str(file), "--out", str(out), "--engine", "fake"]
    assert main(again) == 0
    assert main([*again, "--include", "kl"]) != 0
    assert "options.include" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_what_cannot_be_written_is_refused_before_a_pair_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sums_file(tmp_path, 3)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    missing = ["--sft", str(tmp_path / "none"), "--reference", str(tmp_path / "none"), "--overwrite"]
    reasons = {"out.txt": "the suffix must be", "folder.jsonl": "is a folder", "file/out.jsonl": "cannot be written"}
    for name, reason in reasons.items():
        engine = ["--engine", "fake"] if name == "file/out.jsonl" else missing
        assert main(["score", str(file), "--out", str(tmp_path / name), *engine]) == 2
        assert reason in capsys.readouterr().err


def test_rows_with_an_error_are_no_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "a"}]
    file, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["score", str(file), "--out", str(out), "--engine", "fake", "--on-error", "keep"]) == 0
    assert "2 rows, 1 of them with an error, 2 responses" in capsys.readouterr().out


def test_a_run_that_overwrites_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    again = ["score", str(file), "--out", str(out), "--engine", "fake"]
    assert main(again) == 2
    assert "Leave out --overwrite" not in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 2
    assert "Leave out --overwrite to go on" in capsys.readouterr().err
