"""Files that people have: each is read as what it is, or refused in words with a command that converts it."""

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from data_files import CORPUS, FILES, READ_LAYOUTS, REFUSED_LAYOUTS, DataFile
from dense_reward_trainer.data.demonstration import read_row
from dense_reward_trainer.data.records import LineError
from dense_reward_trainer.data.sources import DataError, DataSource, Demonstration, load
from hypothesis import given
from hypothesis import strategies as st

CONVERTED = [file for file in CORPUS if file.converted]
COMMAND = re.compile(r"(?:To convert them: |: )((?:gzip -dc|python -c|iconv) .*> converted\.jsonl)$", re.MULTILINE)


def names(files: list[DataFile]) -> list[str]:
    return [file.name for file in files]


def written(file: DataFile, folder: Path) -> Path:
    path = folder / f"own data{file.suffix}"
    path.write_bytes(file.content)
    return path


def pairs(demonstration: Demonstration) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in demonstration.messages)


def refusal_of(path: Path, *, skip_bad: bool = False) -> str:
    with pytest.raises(DataError) as refusal:
        load(DataSource(source=str(path), skip_bad=skip_bad))
    return str(refusal.value)


READ = [file for file in CORPUS if file.read]
REFUSED = [file for file in CORPUS if file.refused]


@pytest.mark.parametrize("file", READ, ids=names(READ))
def test_a_file_is_read_as_what_it_is_and_the_columns_that_are_not_read_are_named(
    file: DataFile, tmp_path: Path
) -> None:
    loaded = load(DataSource(source=str(written(file, tmp_path))))
    assert pairs(loaded.demonstrations[0]) == file.read
    columns = [line for line in loaded.summary.split("\n") if line.startswith("columns not read")]
    assert columns == ([f"columns not read: {file.unread}"] if file.unread else [])


@pytest.mark.parametrize("file", REFUSED, ids=names(REFUSED))
def test_any_other_file_is_refused_in_words_and_skipping_lines_is_not_offered(file: DataFile, tmp_path: Path) -> None:
    path = written(file, tmp_path)
    assert file.refused in refusal_of(path)
    if file.name != "sql-create-context":  # its other line is good
        assert "--skip-bad" not in refusal_of(path)
        assert file.refused in refusal_of(path, skip_bad=True), "nothing is left of it"


@pytest.mark.parametrize("file", CONVERTED, ids=names(CONVERTED))
def test_the_command_that_is_printed_converts_the_file(file: DataFile, tmp_path: Path) -> None:
    found = COMMAND.search(refusal_of(written(file, tmp_path)))
    assert found is not None
    here = tmp_path / "python"
    here.symlink_to(sys.executable)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    subprocess.run(found[1], shell=True, check=True, cwd=tmp_path, env=environment)
    assert pairs(load(DataSource(source=str(tmp_path / "converted.jsonl"))).demonstrations[0]) == file.converted


def test_the_corpus_has_files_of_every_kind() -> None:
    assert min(len(READ_LAYOUTS), len(REFUSED_LAYOUTS), len(FILES)) >= 20
    assert len(set(names(CORPUS))) == len(CORPUS)


@given(st.sampled_from(CORPUS), st.integers(0, 400), st.integers(0, 40), st.binary(max_size=4))
def test_a_damaged_file_is_read_or_refused_in_words(file: DataFile, at: int, gone: int, new: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"a{file.suffix}"
        path.write_bytes(file.content[:at] + new + file.content[at + gone :])
        with suppress(DataError):
            assert load(DataSource(source=str(path))).demonstrations


KEYS = st.sampled_from(
    [
        *("messages", "conversations", "prompt", "response", "completion", "chosen", "question", "answer", "text"),
        *("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "tools", "functions"),
        *("replies", "choices", "completions", "answers", "context", "instruction", "label", "output", "weight"),
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.text("a ", max_size=2)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3))


@given(st.dictionaries(KEYS, JSON, max_size=5), st.booleans())
def test_a_row_of_any_values_is_read_or_refused(row: dict[str, object], prompts_only: bool) -> None:
    with suppress(LineError):
        assert read_row(row, "here:1", prompts_only=prompts_only).demonstration.messages
