"""Pairs on disk are read as they were written; a changed file is refused."""

from pathlib import Path

import numpy as np
import pytest
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.reward_model.pairs import AnswerPair, differing, pairs_sha256, read_pairs, write_pairs


def pair(demonstration: list[int], answer: list[int], *, finished: bool = True) -> AnswerPair:
    prompt_P, *rest = (np.array(ids, np.int32) for ids in ([1, 2], demonstration, answer))
    return AnswerPair(prompt_P, rest[0], rest[1], finished)


@pytest.mark.parametrize(
    ("demonstration", "answer", "first"),
    [([5, 6], [5, 7], 1), ([5], [6], 0), ([5, 6], [5], 1), ([5], [5, 6, 7], 1), ([5, 6], [5, 6], None)],
)
def test_the_first_difference(demonstration: list[int], answer: list[int], first: int | None) -> None:
    assert pair(demonstration, answer).first_difference == first


def test_equal_responses_are_left_out() -> None:
    same, other = pair([5], [5]), pair([5], [6])
    assert differing([same, other]) == [other]


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    pairs = [pair([5, 6], [7], finished=False), pair([5], [6])]
    write_pairs(tmp_path / "pairs" / "1.jsonl", pairs)
    found = read_pairs(tmp_path / "pairs" / "1.jsonl")
    assert pairs_sha256(found) == pairs_sha256(pairs) != pairs_sha256(pairs[::-1])
    assert [each.finished for each in found] == [False, True]


@pytest.mark.parametrize("line", ["{", '{"prompt_ids": [1]}', '{"prompt_ids": [], "demonstration_ids": [1]}', "[]"])
def test_a_changed_file_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "1.jsonl").write_text(line + "\n")
    with pytest.raises(JobError, match=r"does not hold the pairs that this run wrote .* use another output_dir"):
        read_pairs(tmp_path / "1.jsonl")
