"""PRMBench: rows as its authors document them, and PRMScore by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from dense_reward_trainer.benchmarks.prm_bench import both_f1, prm_score, read_prm_bench, step_counts
from dense_reward_trainer.benchmarks.thresholds import padded_values
from dense_reward_trainer.data.records import DataError

# the row of docs/data_format.md of ssmisya/PRMBench, with short steps
ROW = {
    "original_question": "In cents, what is the cost of a pencil?",
    "modified_question": "In cents, what is the price of a pencil?",
    "original_process": ["1. a", "2. b"],
    "modified_process": ["1. p", "2. q ", "3. r", "", "5. t"],
    "modified_steps": [3, 4],
    "error_steps": [3, 4, 9],
    "reason": "Step 3 is circular.",
    "idx": "circular_prm_test_p1_0",
    "question": "In cents, what is the cost of a pencil?",
    "classification": "circular",
}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_is_its_modified_solution_with_steps_counted_from_one(tmp_path: Path) -> None:
    (found,) = read_prm_bench(written(tmp_path / "rows.jsonl", ROW))
    assert found.id == "circular_circular_prm_test_p1_0"
    assert (found.solution.problem, found.origin) == (ROW["modified_question"], ROW["original_question"])
    assert found.solution.steps == ("1. p", "2. q", "3. r", ".", "5. t")  # a blank step gets a token
    assert found.wrong == {2, 3, 8}
    assert step_counts([found])(padded_values([[0.0] * 5]), 1.0).tolist() == [[0, 0, 2, 3]]  # step 9 does not exist


def test_a_folder_is_read_whole_and_repeated_rows_count_once(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", ROW, {**ROW, "idx": "other"})
    written(tmp_path / "b.jsonl", {**ROW, "classification": "multi_solutions", "error_steps": []}, ROW)
    assert [(one.category, one.id) for one in read_prm_bench(tmp_path)] == [
        ("circular", "circular_circular_prm_test_p1_0"),
        ("circular", "circular_other"),
        ("multi_solutions", "multi_solutions_circular_prm_test_p1_0"),
    ]


@pytest.mark.parametrize(
    "change", [{"error_steps": ["3"]}, {"error_steps": [True]}, {"modified_process": []}, {"classification": None}]
)
def test_a_row_of_another_form_is_refused_by_its_place(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is not a row of PRMBench"):
        read_prm_bench(written(tmp_path / "rows.jsonl", ROW, {**ROW, **change}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        read_prm_bench(tmp_path / "empty")


def test_prm_score_by_hand(tmp_path: Path) -> None:
    """Five steps, of which 3 and 4 are wrong; the threshold calls 1, 2, 3 right and 4, 5 wrong; the long one is out."""
    one, other = read_prm_bench(written(tmp_path / "rows.jsonl", ROW, {**ROW, "idx": "long"}))
    counts = step_counts([one, other])(padded_values([[1.0, 1.0, 1.0, -1.0, -1.0], []]), 0.0)
    assert counts.tolist() == [[2, 1, 1, 1], [0, 0, 0, 0]]  # TP, FP, TN, FN
    right, wrong = both_f1(counts.sum(axis=0))
    assert right == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert wrong == pytest.approx(2 * 0.5 * 0.5 / 1)
    assert prm_score(counts.sum(axis=0)) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_what_is_undefined_is_minus_one_as_in_mr_eval() -> None:
    right, wrong = both_f1(np.array([3.0, 0.0, 0.0, 1.0]))
    # no step is wrong: of the wrong steps precision is 0 and recall -1, so F1 is 2 * 0 * -1 / -1
    assert [float(right), float(wrong)] == pytest.approx([6 / 7, 0.0])
    assert [float(one) for one in both_f1(np.zeros(4))] == [-1.0, -1.0]
