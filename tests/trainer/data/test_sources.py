import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from dense_reward_trainer.data.sources import (
    ArithmeticOptions,
    ChatMessage,
    DataError,
    DataSource,
    Demonstration,
    data_sha256,
    load,
    open_dataset,
)
from pydantic import ValidationError

WORD_PROBLEMS = Path(__file__).parents[2] / "data" / "word_problems.jsonl"
GOOD = b'{"prompt": "a", "response": "b"}'
PACKED = gzip.compress(GOOD, mtime=0)
BAD = b'{"prompt": "a"}'


def write(path: Path, *lines: bytes) -> DataSource:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return DataSource(source=str(path))


def test_a_file_gives_its_demonstrations_in_order_with_their_places_and_answers() -> None:
    loaded = load(DataSource(source=str(WORD_PROBLEMS)))
    assert [demonstration.answer for demonstration in loaded.demonstrations] == ["46", "2480", "14", "20", "-2", "54"]
    assert [d.source for d in loaded.demonstrations] == [f"{WORD_PROBLEMS}:{line}" for line in range(1, 7)]
    assert loaded.demonstrations[0].prompt_messages[0].content.startswith("Mira plants 6 rows")
    assert "<<6*9=54>>" in loaded.demonstrations[0].response
    assert loaded.skipped == ()


def test_annotations_are_stripped_when_asked() -> None:
    stripped = load(DataSource(source=str(WORD_PROBLEMS), strip_annotations=True)).demonstrations
    assert stripped[2].response == "The notebooks cost 3*4 = $12.\nTogether with the pen that is 12+2 = $14.\n#### $14"


def test_a_gzip_file_gives_what_the_plain_file_gives(tmp_path: Path) -> None:
    packed = tmp_path / "demonstrations.jsonl.gz"
    packed.write_bytes(gzip.compress(WORD_PROBLEMS.read_bytes()))
    plain = load(DataSource(source=str(WORD_PROBLEMS))).demonstrations
    assert data_sha256(load(DataSource(source=str(packed))).demonstrations) == data_sha256(plain)


def test_blank_lines_carriage_returns_and_a_byte_order_mark_leave_the_line_numbers_right(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r", b"", b"  \r", GOOD)
    places = [demonstration.source for demonstration in load(source).demonstrations]
    assert places == [f"{source.source}:1", f"{source.source}:4"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b\x85c", "response": "d"}'.encode())
    assert load(source).demonstrations[0].prompt_messages[0].content == "a\u2028b\x85c"


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"prompt": "a\xff"}', "not UTF-8: byte 0xff at byte 14 of the line"),
    (b'{"prompt": ', "not JSON: Expecting value"),
    (b'{"prompt": "a", "response": "b"} {}', "not JSON: Extra data"),
    (b'{"prompt": "a", "response": "b", "x": NaN}', "not JSON: NaN is not a JSON number"),
    (b'{"prompt": "a", "response": "b", "response": "c"}', "not JSON: an object has the same key twice: 'response'"),
    (b"[" * 100_000, "not JSON: "),
    (b'["a", "b"]', "wrong type: the line is a list, an object is needed"),
    (
        b"{}",
        "unknown keys: has none, needs one of messages; conversations; prompt+response; prompt+completion; instruction",
    ),
    (b'{"prompt": "a", "reply": "b"}', "unknown keys: has 'prompt', 'reply', needs one of"),
    (b'{"prompt": "a", "response": null}', "unknown keys: has 'prompt', needs one of"),
    (
        b'{"prompt": "a", "response": "b", "completion": "c"}',
        "reads as prompt+response and prompt+completion: keep one",
    ),
    (b'{"messages": [], "question": "a", "answer": "b"}', "two formats: has 'answer', 'messages', 'question'"),
    (b'{"prompt": "a", "response": "b", "context": "c"}', "unsupported column: 'context' belongs to the prompt"),
    (b'{"prompt": 1, "response": "b"}', "wrong type: `prompt` is a number, a string is needed"),
    (b'{"prompt": "a", "completion": true}', "wrong type: `completion` is a boolean, a string is needed"),
    (b'{"instruction": "a", "input": {}, "output": "b"}', "wrong type: `input` is an object, a string is needed"),
    (b'{"question": ["a"], "answer": "b"}', "wrong type: `question` is a list, a string is needed"),
    (b'{"prompt": [{"role": "user", "content": "a"}], "response": 7}', "`response` is a number, a list of messages"),
    (
        b'{"prompt": "a", "response": [{"role": "assistant", "content": "b"}]}',
        "`prompt` is a string, a list of messages",
    ),
    (
        b'{"prompt": [{"role": "user", "content": "a"}], "completion": '
        b'[{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        "wrong type: `completion` has 2 messages, one is needed",
    ),
    (b'{"messages": "a"}', "wrong type: `messages` is a string, a list of messages is needed"),
    (b'{"messages": ["a"]}', "wrong type: `messages`[0] is a string, an object with role and content is needed"),
    (b'{"messages": [{"role": "user"}]}', "wrong type: `messages`[0].content is missing, a string is needed"),
    (b'{"messages": [{"role": 1, "content": "a"}]}', "wrong type: `messages`[0].role is a number, a string is needed"),
    (
        b'{"messages": [{"role": "human", "content": "a"}]}',
        "unknown role: `messages`[0].role is 'human', one of system",
    ),
    (
        b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}',
        "wrong type: `messages`[0].tool_calls[0] is not a tool call: write {",
    ),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no response: the last message is by the user"),
    (b'{"messages": []}', "no response: `messages` is an empty list"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "empty prompt: nothing visible comes before"),
    (b'{"prompt": [], "completion": [{"role": "assistant", "content": "a"}]}', "empty prompt: `prompt` is an empty"),
    (b'{"prompt": " ", "response": "b"}', "empty prompt: nothing visible comes before the response"),
    (b'{"prompt": "a", "response": "\\n"}', "empty response: the response has no visible character"),
    (b'{"prompt": "a\\ud83d", "response": "b"}', "lone surrogate: `prompt` has U+D83D at character 2"),
    (b'{"prompt": "a", "response": "\\udc00"}', "lone surrogate: `response` has U+DC00 at character 1"),
    (b'{"prompt": "a", "response": "b", "final_answer": " . "}', "empty final_answer: `final_answer` is blank"),
    (b'{"prompt": "a", "response": "b", "final_answer": false}', "wrong type: `final_answer` is a boolean"),
    (b'{"prompt": "a", "response": "b", "final_answer": 1e999}', "wrong type: `final_answer` is inf, a finite number"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES, ids=[fault[:60] for _, fault in BAD_LINES])
def test_a_bad_line_is_refused_with_its_file_its_number_and_the_reason(line: bytes, fault: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    with pytest.raises(DataError) as refusal:
        load(source)
    (bad,) = refusal.value.bad_lines
    assert (bad.file, bad.line) == (source.source, 3)
    assert fault in str(bad)
    assert f"1 of 3 lines are not demonstrations:\n  {source.source}:3: {bad.reason}: {bad.detail}" in str(
        refusal.value
    )
    str(refusal.value).encode()


def test_the_first_ten_bad_lines_are_listed_with_the_total_and_the_cure(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, *[BAD] * 13)
    with pytest.raises(DataError) as refusal:
        load(source)
    first, *listed, more, layouts, cure = str(refusal.value).split("\n")
    assert first == f"{source.source}: 13 of 14 lines are not demonstrations:"
    assert [line.split(": ")[0] for line in listed] == [f"  {source.source}:{number}" for number in range(2, 12)]
    assert more == "  and 3 more"
    assert layouts == "docs/data.md has all layouts."
    assert cure == "Correct them, or leave them out: add --skip-bad to the command."
    assert len(refusal.value.bad_lines) == 13


def test_skipped_bad_lines_are_counted_by_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b"?", GOOD, BAD, b'{"x": 1}', GOOD)
    loaded = load(source.model_copy(update={"skip_bad": True}))
    assert [demonstration.source[-2:] for demonstration in loaded.demonstrations] == [":2", ":5"]
    assert [bad.line for bad in loaded.skipped] == [1, 3, 4]
    assert loaded.skipped_by_reason == {"unknown keys": 2, "not JSON": 1}


def test_nothing_left_is_an_error_even_when_bad_lines_may_be_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BAD, BAD)
    with pytest.raises(DataError, match=r"nothing to learn from: .* leave 2 of 2 lines\n.*2 of 2 lines are not demons"):
        load(source.model_copy(update={"skip_bad": True}))
    with pytest.raises(DataError, match="limit None and skip_last 5 leave 0 of 2 lines"):
        load(source.model_copy(update={"skip_last": 5}))


@pytest.mark.parametrize(
    ("limit", "skip_last", "lines"),
    [
        (None, 0, [1, 2, 3, 4, 5, 6]),
        (2, 0, [1, 2]),
        (None, 4, [1, 2]),
        (3, 4, [1, 2]),
        (1, 4, [1]),
        (9, 0, [*range(1, 7)]),
    ],
)
def test_limit_takes_the_first_lines_of_what_skip_last_leaves(
    limit: int | None, skip_last: int, lines: list[int]
) -> None:
    loaded = load(DataSource(source=str(WORD_PROBLEMS), limit=limit, skip_last=skip_last))
    assert [int(demonstration.source.rpartition(":")[2]) for demonstration in loaded.demonstrations] == lines


def test_bad_lines_outside_the_asked_range_are_no_matter(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, GOOD, BAD)
    assert len(load(source.model_copy(update={"skip_last": 1})).demonstrations) == 2
    assert len(load(source.model_copy(update={"limit": 2})).demonstrations) == 2


class RecordingOpener:
    """A fake hub: two rows for any name; it records the names that were opened."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, str | None, str]] = []

    def __call__(self, name: str, config: str | None, split: str) -> list[Mapping[str, object]]:
        self.opened.append((name, config, split))
        return [{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "#### 2"}]


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main@test", ("openai/gsm8k", "main", "test")),
        ("some-org/v1.5-chat@train[:10%]", ("some-org/v1.5-chat", None, "train[:10%]")),
        ("./folder@test", ("./folder", None, "test")),
    ],
)
def test_what_is_no_file_is_a_data_set_with_a_configuration_and_a_split(
    source: str, opened: tuple[str, str | None, str]
) -> None:
    opener = RecordingOpener()
    loaded = load(DataSource(source=source), opener)
    assert opener.opened == [opened]
    assert [(d.source, d.answer) for d in loaded.demonstrations] == [(f"{source}:1", "1"), (f"{source}:2", "2")]


@pytest.mark.parametrize("source", ["@train", "name@", "name:@test", ":main"])
def test_an_incomplete_data_set_name_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"does not name a data set: write name\[:config\]\[@split\]"):
        load(DataSource(source=source), RecordingOpener())


def test_an_existing_file_wins_over_a_data_set_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "org@train.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    opener = RecordingOpener()
    assert len(load(DataSource(source="org@train.jsonl"), opener).demonstrations) == 1
    assert opener.opened == []


@pytest.mark.parametrize("source", ["a.jsonl", "a@b.jsonl.gz", "./a", "/nowhere/a", "~/no-such-file", "folder/a"])
def test_a_missing_file_is_not_looked_for_as_a_data_set(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    opener = RecordingOpener()
    with pytest.raises(DataError, match=r"no such file.*data set such as openai/gsm8k:main@train.*generator"):
        load(DataSource(source=source), opener)
    assert opener.opened == []


def test_a_folder_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder: name a .jsonl file in it, or write .*@train"):
        load(DataSource(source=str(tmp_path)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only .jsonl and .json files, plain or .gz, and .parquet are read: rename it"):
        load(write(tmp_path / "a.txt", GOOD))
    with pytest.raises(DataError, match=r"(?s)CSV.*csv\.DictReader"):
        load(write(tmp_path / "a.csv", b"question,answer", b"2+3?,5"))


# Named, because compressed bytes hold the time, and workers of pytest-xdist must agree on the names of tests.
@pytest.mark.parametrize(
    "content",
    [GOOD, gzip.compress(GOOD)[:-4], gzip.compress(GOOD)[:-12] + b"\xff" * 12],
    ids=["not compressed", "cut off", "overwritten"],
)
def test_a_damaged_gzip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(content)
    with pytest.raises(DataError, match="not a complete gzip file"):
        load(DataSource(source=str(packed)))


def test_the_datasets_library_reads_a_folder_and_its_null_columns_are_missing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the data set source needs the train extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "#### 4"}], "final_answer": 5},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(DataSource(source=f"{folder}@train", skip_bad=True))
    assert [str(bad) for bad in loaded.skipped] == [
        f"{folder}@train:1: unknown keys: `messages`[0] has 'name', which no chat template writes: put it into the "
        "content, or remove it"
    ]
    expected = Demonstration((ChatMessage("user", "c"), ChatMessage("assistant", "#### 4")), "5", f"{folder}@train:2")
    assert loaded.demonstrations == (expected,)
    with pytest.raises(DataError, match=r"configuration default, split test\) it could not be loaded: .*test"):
        open_dataset(str(folder), None, "test")


def test_the_arithmetic_source_gives_worked_additions() -> None:
    source = DataSource(source="arithmetic", arithmetic=ArithmeticOptions(demonstrations=20, digits=2))
    demonstrations = load(source).demonstrations
    assert len(demonstrations) == 20
    assert demonstrations[16].source == "arithmetic:17"
    for demonstration in demonstrations:
        a, b = demonstration.prompt_messages[0].content.removeprefix("Add ").removesuffix(".").split(" and ")
        assert demonstration.answer == str(int(a) + int(b))
        assert demonstration.response.endswith(f"#### {demonstration.answer}")


def test_under_label_noise_the_answer_stays_the_true_sum() -> None:
    clean = ArithmeticOptions(demonstrations=40, digits=2)
    noisy = clean.model_copy(update={"label_noise": 1.0})
    truth = load(DataSource(source="arithmetic", arithmetic=clean)).demonstrations
    spoilt = load(DataSource(source="arithmetic", arithmetic=noisy)).demonstrations
    assert [demonstration.answer for demonstration in spoilt] == [demonstration.answer for demonstration in truth]
    assert all(bad.response != good.response for bad, good in zip(spoilt, truth, strict=True))


def test_the_arithmetic_options_are_resolved_for_their_source_and_refused_for_others() -> None:
    assert DataSource(source="arithmetic").arithmetic == ArithmeticOptions()
    assert DataSource(source="a.jsonl").arithmetic is None
    with pytest.raises(
        ValidationError, match=r"was given for the source 'a.jsonl', which does not use it: set it to null"
    ):
        DataSource(source="a.jsonl", arithmetic=ArithmeticOptions())


@pytest.mark.parametrize("source", ["arithmetic", "a.jsonl"])
def test_a_saved_source_is_read_back_as_it_was(source: str) -> None:
    saved = DataSource(source=source, limit=3).model_dump_json()
    assert DataSource.model_validate_json(saved) == DataSource(source=source, limit=3)


@pytest.mark.parametrize(
    "extra", [{"limit": 0}, {"skip_last": -1}, {"held_out_fraction": 1.0}, {"held_out_fraction": -0.1}, {"shuffle": 1}]
)
def test_fields_out_of_range_or_unknown_are_refused(extra: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(extra))):
        DataSource.model_validate({"source": "a.jsonl", **extra})


def test_every_field_is_described() -> None:
    assert all(field.description for field in DataSource.model_fields.values())


def test_a_git_lfs_pointer_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match="is a git-lfs pointer, not the data: run `git lfs pull`"):
        load(DataSource(source=str(path)))
