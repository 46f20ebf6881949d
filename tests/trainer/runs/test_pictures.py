"""Pictures: the format of the suffix, the same bytes for the same figure, and whole or not at all."""

from pathlib import Path

import pytest
from dense_reward_trainer.runs.pictures import write_picture
from limited_files import no_file_beyond
from matplotlib.figure import Figure


def figure(value: float) -> Figure:
    drawn = Figure(figsize=(2, 2))
    drawn.subplots().bar(["a", "b"], [1.0, value])
    return drawn


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_picture_has_the_format_of_its_suffix(tmp_path: Path, name: str, start: bytes) -> None:
    write_picture(figure(2.0), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert b"<dc:date>" not in (tmp_path / name).read_bytes()


def test_a_full_disk_leaves_the_earlier_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_picture(figure(2.0), path)
    before = path.read_bytes()
    with no_file_beyond(100), pytest.raises(OSError, match="too large"):
        write_picture(figure(3.0), path)
    assert path.read_bytes() == before
    write_picture(figure(3.0), path)
    assert path.read_bytes() != before
