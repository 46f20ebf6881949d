"""Inputs: every row from any position, and what is refused."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_runs import sums_file
from dense_reward.bulk.records import Position, Source
from dense_reward.bulk.sources import data_set_name, open_source
from dense_reward.errors import SettingsError

ROWS = [{"prompt": f"{n}", "n": n} for n in range(600)]


def sources(folder: Path) -> dict[str, Source]:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "a.parquet", row_group_size=70)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return {name: open_source(str(folder / name)) for name in ("a.parquet", "a.jsonl", "saved")}


@pytest.mark.slow
def test_reading_goes_on_behind_any_row(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        rows = list(source.rows(Position()))
        assert source.total == len(ROWS), name
        assert [row.cells for row in rows] == ROWS, name
        assert [row.number for row in rows] == list(range(600)), name
        for place in (0, 68, 69, 70, 255, 256, 411, 599):
            rest = [row.number for row in source.rows(rows[place].end)]
            assert rest == list(range(place + 1, 600)), (name, place)
        starts = list(source.positions(rows[9].end, 256))
        assert [next(iter(source.rows(start))).number for start in starts] == [10, 266, 522], name


def test_lines_that_are_no_rows_are_skipped_or_have_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \nnot json\n[1]\n{"a": 2}')
    rows = list(open_source(str(file)).rows(Position()))
    assert [(row.number, row.cells) for row in rows] == [(0, {"a": 1}), (3, {}), (4, {}), (5, {"a": 2})]
    assert "line 4 is not JSON" in (rows[1].fault or "")
    assert "line 5 is no JSON object" in (rows[2].fault or "")


def test_a_name_that_is_there_twice_is_no_column(tmp_path: Path) -> None:
    lines, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text('{"prompt": "a", "response": "b", "prompt": "c"}\n')
    row = next(iter(open_source(str(lines)).rows(Position())))
    assert "the key 'prompt' is there twice" in (row.fault or "")
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), parquet)
    with pytest.raises(SettingsError, match="several columns 'prompt'"):
        open_source(str(parquet))


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    file = sums_file(tmp_path, 3)
    before = open_source(str(file)).identity
    moved = file.rename(tmp_path / "moved.jsonl")
    assert open_source(str(moved)).identity == before
    moved.write_text(moved.read_text().replace("2", "3"))
    assert open_source(str(moved)).identity != before


def test_a_split_must_be_chosen_if_there_are_several(tmp_path: Path) -> None:
    both = {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    assert open_source(f"{tmp_path / 'saved'}:test").total == 3
    with pytest.raises(SettingsError, match="has the splits train, test"):
        open_source(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "")),
        ("openai/gsm8k:train", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k@train", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main@train", ("openai/gsm8k", "main", "train")),
    ],
)
def test_a_data_set_is_named_as_in_recipes_too(name: str, parts: tuple[str, str | None, str]) -> None:
    assert data_set_name(name) == parts


def test_two_configurations_of_a_data_set_are_refused() -> None:
    with pytest.raises(SettingsError, match="name different configurations"):
        open_source("openai/gsm8k:main@train", "socratic")


@pytest.mark.parametrize("content", [b"[1, 2]", b"\xef\xbb\xbf [{}]"])
def test_one_json_list_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SettingsError, match="write it as JSONL"):
        open_source(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "a.txt", "bad.parquet", "folder"])
def test_what_cannot_be_read_is_refused_with_the_cure(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError):
        open_source(name)
