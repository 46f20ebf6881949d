"""Files that are written completely or not at all."""

from pathlib import Path

import pytest
from dense_reward.checkpoints.atomic_file import write_whole


def test_a_file_is_created_and_replaced_and_nothing_else_remains(tmp_path: Path) -> None:
    for content in (b"first", b"", b"second"):
        write_whole(tmp_path / "figures.json", content)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"figures.json": content}


def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    write_whole(path, b"before")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"


def test_a_rest_of_an_interrupted_write_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".figures.json.partial").write_bytes(b"half of a lon")
    write_whole(tmp_path / "figures.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
