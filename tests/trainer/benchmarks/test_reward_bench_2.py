"""RewardBench 2: its rows, and its accuracies by hand."""

import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from dense_reward_trainer.benchmarks.reward_bench_2 import best_of_n, read_reward_bench_2, ties_score
from dense_reward_trainer.data.records import DataError

ROW = {
    "id": "7",
    "prompt": "Say hello.",
    "chosen": ["Hello."],
    "rejected": ["Bye.", "No.", "42"],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "models": ["a", "b", "c", "d"],
    "subset": "Factuality",
    "additional_metadata": None,
}
REF = {**ROW, "id": "ref:3", "subset": "Ties", "chosen": ["red"], "rejected": ["salt", "seven"]}
TIED = {**REF, "id": "tied:3", "chosen": ["red", "blue"], "num_correct": 2}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_right_responses_come_first(tmp_path: Path) -> None:
    one, tie = read_reward_bench_2(written(tmp_path / "rows.jsonl", ROW, TIED))
    assert (one.responses, one.right, one.is_tie) == (("Hello.", "Bye.", "No.", "42"), 1, False)
    assert (tie.responses, tie.right, tie.is_tie) == (("red", "blue", "salt", "seven"), 2, True)


def test_the_parquet_file_of_the_data_set_is_read_too(tmp_path: Path) -> None:
    Dataset.from_list([ROW, {**ROW, "id": "8"}]).to_parquet(tmp_path / "test.parquet")
    assert [one.id for one in read_reward_bench_2(tmp_path / "test.parquet")] == ["7", "8"]


@pytest.mark.parametrize(
    "change", [{"rejected": []}, {"num_correct": 2}, {"chosen": "Hello."}, {"id": "3"}, {"prompt": "\ud800"}]
)
def test_a_row_of_another_form_is_refused_by_its_place(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1 is not a row of RewardBench 2"):
        read_reward_bench_2(written(tmp_path / "rows.jsonl", {**REF, **change}))


def test_a_row_needs_an_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="id must be a text or a number"):
        read_reward_bench_2(written(tmp_path / "rows.jsonl", {**ROW, "id": None}))


def test_the_right_one_must_be_the_best_and_shares_a_tie() -> None:
    assert [best_of_n(scores) for scores in ([3, 1, 2, 0], [1, 3, 2, 0], [2, 2, 2, 0])] == [1.0, 0.0, 1 / 3]


def test_the_score_of_ties_by_hand(tmp_path: Path) -> None:
    """Right answers differ by 1; the worst right one is 2 above the best wrong one, of the single one 4."""
    choices = read_reward_bench_2(written(tmp_path / "rows.jsonl", REF, TIED))
    found = ties_score(choices, [[5.0, 1.0, 0.0], [4.0, 3.0, 1.0, 0.0]])
    assert found == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(2 / 1 - 1))
    worse = ties_score(choices, [[0.0, 1.0, 0.0], [4.0, 1.0, 0.0, -1.0]])
    # both tied answers win but differ by 3, more than the 1 to the best wrong one; the single one loses by 1
    assert worse == pytest.approx(0.3 + 0.01 * math.tanh(-1 / 3 - 1))
    assert math.isnan(ties_score(choices[:1], [[5.0, 1.0, 0.0]]))
