"""Inputs that are damaged, or change while they are read: the rows at fault are named, the others are scored."""

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_runs import FakeScorer, a_job, rows_of, run, sums_file, write_rows
from dense_reward.bulk.records import Position
from dense_reward.bulk.run_state import state_of
from dense_reward.bulk.sources import open_source
from dense_reward.errors import BulkError, SettingsError

ROWS = [{"prompt": f"{n}+1", "response": f"a response to {n}"} for n in range(40)]


def damaged_parquet(folder: Path) -> Path:
    """The second of four row groups has another byte in a page; the footer is as before."""
    file = folder / "in.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=10, compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[content.index(b"a response to 13")] ^= 1
    file.write_bytes(content)
    return file


def test_a_damaged_page_stops_the_run_at_its_row_and_can_be_left_out(tmp_path: Path) -> None:
    file, out = damaged_parquet(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(BulkError, match=r"row 10 .*in\.parquet cannot be read up to row 19"):
        run(a_job(file, out), FakeScorer())
    assert [row["row"] for row in rows_of(out)] == list(range(10))
    run(a_job(file, out, on_error="keep"), FakeScorer())
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(40))
    assert [row["row"] for row in rows if row["error"]] == list(range(10, 20))


def test_a_compressed_page_without_a_checksum_is_found_too(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=10, compression="snappy")
    start = pq.read_metadata(file).row_group(2).column(1).data_page_offset
    content = bytearray(file.read_bytes())
    content[start + 20 : start + 60] = b"\xff" * 40
    file.write_bytes(content)
    rows = list(open_source(str(file)).rows(Position(5)))
    assert [row.number for row in rows] == list(range(5, 40))
    assert {row.number for row in rows if row.fault} == set(range(20, 30))


def test_a_text_that_is_not_unicode_is_a_fault_of_its_row(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"c"]).buffers())
    pq.write_table(pa.table({"prompt": texts, "response": texts}), tmp_path / "in.parquet")
    rows = list(open_source(str(tmp_path / "in.parquet")).rows(Position()))
    assert [row.fault is None for row in rows] == [True, False, True]
    assert [row.end.row for row in rows] == [1, 2, 3]


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def test_a_data_set_whose_file_was_changed_is_another_one(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = open_source(str(folder)).identity
    assert open_source(str(folder)).identity == before
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"a response to 13", b"a response to 31"))
    assert open_source(str(folder)).identity != before


def test_damaged_rows_of_a_data_set_have_faults(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (file,) = folder.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[content.index(b"a response to 13")] = 0xFF
    file.write_bytes(content)
    rows = list(open_source(str(folder)).rows(Position(3)))
    assert [row.number for row in rows] == list(range(3, 40))
    assert {row.number for row in rows if row.fault} == {13}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "dataset_info.json").write_text("[]"),
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: next(folder.glob("*.arrow")).write_bytes(b"\0" * 100),
    ],
    ids=["state", "info", "missing", "zeros"],
)
def test_a_damaged_folder_of_datasets_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = saved(tmp_path)
    damage(folder)
    with pytest.raises(SettingsError, match=r"saved is damaged.*copy it again"):
        open_source(str(folder))


def test_lines_that_are_appended_meanwhile_are_not_read(tmp_path: Path) -> None:
    file = sums_file(tmp_path, 3)
    source = open_source(str(file))
    with file.open("a") as end:
        end.write('{"prompt": "a", "response": "b"}\n')
    assert [row.number for row in source.rows(Position())] == [0, 1, 2]
    assert [position.row for position in source.positions(Position(), 1)] == [0, 1, 2]


def test_a_file_that_becomes_shorter_or_goes_stops_the_run_behind_its_rows(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, 30), tmp_path / "out.jsonl"
    job = a_job(file, out)
    os.truncate(file, file.read_bytes().index(b'{"prompt": "20+1"'))
    with pytest.raises(BulkError, match="restore it"):
        run(job, FakeScorer())
    assert [row["row"] for row in rows_of(out)] == list(range(20))
    state = state_of(out)
    assert state is not None
    assert not state.done
    file.unlink()
    with pytest.raises(BulkError, match="cannot be read any more"):
        run(job, FakeScorer())


def test_a_row_that_is_nested_too_deep_is_a_fault(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", [{"a": 1}])
    with file.open("a") as end:
        end.write('{"a": ' + "[" * 500 + "]" * 500 + "}\n")
        end.write('{"a": [' + "[]," * 500 + "1]}\n")
    rows = list(open_source(str(file)).rows(Position()))
    assert ["nested deeper" in (row.fault or "") for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b"\x1f\x8b\x08", "compressed"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed"),
        ("a.jsonl", b"\xff\xfe{\0}\0", "UTF-16"),
        ("none.jsonl.gz", None, "no such file"),
        ("a" * 300 + ".jsonl", None, "cannot be read"),
    ],
    ids=["gz", "renamed", "utf16", "missing", "long"],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SettingsError, match=reason):
        open_source(name)


def test_a_pipe_and_a_configuration_of_a_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SettingsError, match="write it to a file first"):
        open_source(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(SettingsError, match="--config main is for a data set by name"):
        open_source(str(sums_file(tmp_path, 1)), "main")
