"""The pairs of a round on disk: exact ids, nothing generated twice, and no foreign line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dense_reward.engines.fake import EOS_ID, FakeTokenizer
from dense_reward.text.encode import Encoder
from dense_reward_trainer.data.records import ChatMessage, Demonstration
from dense_reward_trainer.data.tokenised import encode_demonstrations
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.selfplay.pairs import Pair, PairCounts, PairFile

ENCODER = Encoder.of(FakeTokenizer(), "plain")


def pair_file(path: Path, rows: int = 5, chunk: int = 2) -> PairFile:
    demonstrations = [
        Demonstration((ChatMessage("user", f"Say {i}."), ChatMessage("assistant", f"It is {i}")), None, f"rows:{i}")
        for i in range(rows)
    ]
    encoded = encode_demonstrations(demonstrations, ENCODER, every_turn=False, limit_tokens=99, skip_bad=False)
    return PairFile(path, tuple(range(10, 10 + rows)), encoded.rows, chunk)


def rollouts(pairs: PairFile, chunk: range) -> list[Rollout]:
    """`ok` and the end of turn for even rows, a cut-off `ok` for odd ones."""
    ids = [*b"ok"]
    return [
        Rollout(pairs.rows[i].encoded.prompt_P, np.array(ids + [EOS_ID] * (i % 2 == 0), dtype=np.int32), i % 2 == 0)
        for i in chunk
    ]


def complete(pairs: PairFile) -> list[range]:
    written = list(pairs.missing())
    for chunk in written:
        pairs.append(chunk, rollouts(pairs, chunk), ENCODER)
    return written


def test_a_pair_keeps_exact_ids_and_text(tmp_path: Path) -> None:
    pairs = pair_file(tmp_path / "pairs.jsonl")
    complete(pairs)
    finished, cut_off = pairs.read()[:2]
    assert (finished.place, finished.source, finished.finished) == (10, "rows:0", True)
    assert finished.generated_ids == (*b"ok", EOS_ID)
    assert finished.demonstration_ids == (*b"It is 0", EOS_ID)
    assert (finished.demonstration, finished.generated) == ("It is 0", "ok")
    assert cut_off.generated_ids == (*b"ok",), "an end of turn is never appended"
    assert (cut_off.generated, cut_off.finished) == ("ok", False)


def test_chunks_end_with_the_rows(tmp_path: Path) -> None:
    pairs = pair_file(tmp_path / "pairs.jsonl")
    assert complete(pairs) == [range(2), range(2, 4), range(4, 5)]
    assert list(pairs.missing()) == []


@pytest.mark.parametrize(("kept", "missing"), [(0, [0, 2, 4]), (2, [2, 4]), (3, [2, 4]), (4, [4])])
def test_after_a_kill_only_whole_chunks_count(tmp_path: Path, kept: int, missing: list[int]) -> None:
    pairs = pair_file(tmp_path / "pairs.jsonl")
    complete(pairs)
    whole = pairs.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    pairs.path.write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
    assert [chunk.start for chunk in complete(pairs)] == missing
    assert pairs.path.read_bytes() == whole


def without_a_line(lines: list[str]) -> list[str]:
    return lines[1:]


def with_another_prompt(lines: list[str]) -> list[str]:
    return [json.dumps(json.loads(lines[0]) | {"prompt_ids": [1]}) + "\n", *lines[1:]]


def with_no_json(lines: list[str]) -> list[str]:
    return [lines[0], "{\n", *lines[2:]]


def with_a_line_too_many(lines: list[str]) -> list[str]:
    return [*lines, lines[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_line, r"jsonl:1 holds another prompt or demonstration than rows:0"),
        (with_another_prompt, r"jsonl:1 holds another prompt or demonstration than rows:0"),
        (with_no_json, r"jsonl:2 is not a pair"),
        (with_a_line_too_many, r"has 6 lines for 5 prompts"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    pairs = pair_file(tmp_path / "pairs.jsonl")
    complete(pairs)
    pairs.path.write_text("".join(change(pairs.path.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=message):
        pairs.read()


def test_what_was_generated_is_counted() -> None:
    def pair(ids: tuple[int, ...], finished: bool) -> Pair:
        shared = {"place": 0, "source": "a:1", "prompt_ids": (1,), "demonstration": "", "generated": ""}
        return Pair.model_validate(shared | {"demonstration_ids": (7, 9), "generated_ids": ids, "finished": finished})

    counts = PairCounts.of([pair((7, 9), True), pair((9,), True), pair((7, 7, 7), False)])
    assert (counts.pairs, counts.identical, counts.cut_off, counts.empty) == (3, 1, 1, 1)
    assert (counts.generated_tokens, counts.demonstration_tokens) == (2.0, 2.0)
    assert "3 pairs, 1 answers equal their demonstration, 1 cut off, 1 empty" in counts.in_words
