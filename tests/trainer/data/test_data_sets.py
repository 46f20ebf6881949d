"""Public data sets: each is read in exactly its columns, as JSON Lines, as Parquet and by its name at the hub."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
from data_files import JsonRow
from dense_reward_trainer.data.data_sets import KNOWN, dataset_name, known_data_set, open_dataset
from dense_reward_trainer.data.layouts import LAYOUTS
from dense_reward_trainer.data.sources import DataError, DataSource, LoadedRows, load
from public_data import PUBLIC, PublicData
from pyarrow import parquet

READ = [one for one in PUBLIC if not one.refused]
REFUSED = [one for one in PUBLIC if one.refused]
NAMED = [(one, name) for one in PUBLIC for name in one.names if " " not in name]


def ids(found: Sequence[PublicData]) -> list[str]:
    return [one.id for one in found]


Write = Callable[[Path, Sequence[JsonRow]], str]


def as_json(path: Path, rows: Sequence[JsonRow]) -> str:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def as_parquet(path: Path, rows: Sequence[JsonRow]) -> str:
    file = path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file)
    return str(file)


def first(loaded: LoadedRows) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in loaded.demonstrations[0].messages)


def columns(loaded: LoadedRows) -> str:
    found = [line for line in loaded.summary.split("\n") if line.startswith("columns not read: ")]
    return found[0].removeprefix("columns not read: ") if found else ""


@pytest.mark.parametrize("written", [as_json, as_parquet], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("one", READ, ids=ids(READ))
def test_a_file_in_the_columns_of_a_public_data_set_is_read(one: PublicData, written: Write, tmp_path: Path) -> None:
    loaded = load(DataSource(source=written(tmp_path, one.rows)))
    assert first(loaded) == one.messages
    assert loaded.demonstrations[0].answer == one.answer
    assert sorted(columns(loaded).split(", ")) == sorted(one.unread.split(", "))


@pytest.mark.parametrize("written", [as_json, as_parquet], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("one", REFUSED, ids=ids(REFUSED))
def test_a_layout_with_a_choice_is_refused_with_a_command_that_converts_the_file(
    one: PublicData, written: Write, tmp_path: Path
) -> None:
    source = written(tmp_path, one.rows)
    with pytest.raises(DataError, match=one.refused) as refusal:
        load(DataSource(source=source))
    command = re.search(r"To convert them: (python -c .* > converted\.jsonl)$", str(refusal.value), re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1])
    done = subprocess.run(
        [sys.executable, *words[1:3], *([source] if source.endswith("parquet") else [])],
        input=None if source.endswith("parquet") else Path(source).read_text(),
        capture_output=True, text=True, check=True, env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (tmp_path / "converted.jsonl").write_text(done.stdout)
    assert first(load(DataSource(source=str(tmp_path / "converted.jsonl")))) == one.messages


@pytest.mark.parametrize(("one", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_public_data_set_is_opened_by_its_hub_id_and_by_its_short_names(one: PublicData, name: str) -> None:
    opened: list[tuple[str, str | None, str]] = []

    def opener(name: str, config: str | None, part: str) -> list[JsonRow]:
        opened.append((name, config, part))
        return list(one.rows)

    if one.refused:
        with pytest.raises(DataError, match=one.refused) as refusal:
            load(DataSource(source=name), opener)
        command = next(line for line in str(refusal.value).split("\n") if line.startswith("To convert them: "))
        assert f"datasets.load_dataset({opened[0][0]!r}, None, split='train')" in shlex.split(command)[5]
        return
    loaded = load(DataSource(source=name), opener)
    assert first(loaded) == one.messages
    hub, config, part = opened[0]
    assert f"{hub}{f':{config}' if config else ''}@{part}" in loaded.summary.split(": ")[0] + loaded.source
    known = known_data_set(re.split("[@:]", name)[0])
    assert known is not None
    assert (hub, config, part) == (known.hub_id, known.config, known.split)
    assert set(known.columns) <= set(one.rows[0]), "the table names columns that the data set has"


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        ("ultrachat200k", ("HuggingFaceH4/ultrachat_200k", None, "train_sft")),
        ("ultrachat200k@test_sft", ("HuggingFaceH4/ultrachat_200k", None, "test_sft")),
        ("HuggingFaceH4/ultrachat_200k@train_gen", ("HuggingFaceH4/ultrachat_200k", None, "train_gen")),
        ("GSM8K@test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:socratic", ("openai/gsm8k", "socratic", "train")),
        ("gsm8k:socratic@test[:5%]", ("openai/gsm8k", "socratic", "test[:5%]")),
        ("Anthropic HH", ("Anthropic/hh-rlhf", None, "train")),
        ("own/gsm8k", ("own/gsm8k", None, "train")),
        ("unknown", ("unknown", None, "train")),
    ],
)
def test_configuration_and_split_of_a_known_data_set_are_completed_and_never_replaced(
    source: str, opened: tuple[str, str | None, str]
) -> None:
    assert dataset_name(source) == opened


def test_a_folder_of_that_name_wins_over_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dataset_name("gsm8k@train") == ("gsm8k", None, "train")


def test_every_known_data_set_is_tested_and_documented_and_has_a_layout_of_its_columns() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    tested = {known_data_set(re.split("[@:]", name)[0]) for _, name in NAMED}
    layouts = [set(layout.keys) for layout in LAYOUTS]
    for short, known in KNOWN.items():
        row = next(line for line in page.split("\n") if f"| {known.hub_id}" in line)
        assert row.split("|")[1].strip(" `") == short
        assert f"{known.split}" in row
        assert (known.config or "") in row
        assert all(f"`{column}`" in row for column in known.columns)
        assert known in tested
        assert short.startswith("oasst") or any(keys <= set(known.columns) for keys in layouts)


def test_a_data_set_with_a_script_is_refused_with_the_way_to_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the data set source needs the train extra")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found own.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"loading script.*refs/convert/parquet.*name one file as the source"):
        open_dataset("own/data", None, "train")


def test_a_name_that_is_not_known_is_refused_with_the_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the data set source needs the train extra")

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("Couldn't find any data file")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"a short name of one \(alpaca, .*gsm8k, .*ultrachat200k"):
        open_dataset("gsm9k", None, "train")


def test_damaged_empty_and_misnamed_parquet_files_are_refused_in_words(tmp_path: Path) -> None:
    source = as_parquet(tmp_path, [{"prompt": "a", "response": "b"}])
    content = Path(source).read_bytes()
    misnamed = tmp_path / "rows.jsonl"
    misnamed.write_bytes(content)
    with pytest.raises(DataError, match=r"is a Parquet file: rename it to rows\.jsonl\.parquet"):
        load(DataSource(source=str(misnamed)))
    for damaged in (content[:-9], content[:40] + content[60:], b"PAR1"):
        Path(source).write_bytes(damaged)
        with pytest.raises(DataError, match="is a Parquet file that is damaged or incomplete"):
            load(DataSource(source=source))
    empty = as_parquet(tmp_path, [])
    with pytest.raises(DataError, match="is an empty Parquet file"):
        load(DataSource(source=empty))


def test_rows_of_a_parquet_file_are_numbered_from_1_and_keep_their_order(tmp_path: Path) -> None:
    rows: list[JsonRow] = [{"prompt": f"p{number}", "response": "b" if number != 2 else " "} for number in range(1, 5)]
    source = as_parquet(tmp_path, rows)
    with pytest.raises(DataError, match=r"parquet:2: empty response"):
        load(DataSource(source=source))
    loaded = load(DataSource(source=source, skip_bad=True, skip_last=1))
    assert [one.source[-2:] for one in loaded.demonstrations] == [":1", ":3"]
