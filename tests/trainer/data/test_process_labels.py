"""Lines of ProcessBench and PRM800K, read as their authors describe them; and which step a token belongs to."""

import json
from pathlib import Path

import pytest
from dense_reward_trainer.credit.first_wrong_step import steps_of
from dense_reward_trainer.data.process_labels import Solution, read_solutions
from dense_reward_trainer.data.sources import DataError


def written(folder: Path, *lines: object) -> Path:
    path = folder / "solutions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def step(*rated: tuple[object, int | None], chosen: int | None = 0, human: str | None = None) -> dict[str, object]:
    return {
        "completions": [{"text": text, "rating": rating, "flagged": False} for text, rating in rated],
        "human_completion": None if human is None else {"text": human, "rating": None},
        "chosen_completion": chosen,
    }


def prm(*steps: dict[str, object], reason: str = "found_error") -> dict[str, object]:
    return {"question": {"problem": "P"}, "label": {"steps": list(steps), "finish_reason": reason}}


def test_process_bench_names_the_first_wrong_step(tmp_path: Path) -> None:
    lines = [
        {"id": "gsm8k-0", "problem": "P", "steps": ["a", "b"], "final_answer_correct": False, "label": 1},
        {"id": "gsm8k-1", "problem": "Q", "steps": ["a"], "final_answer_correct": True, "label": -1},
    ]
    path = written(tmp_path, *lines)
    assert read_solutions(path) == [
        Solution("P", ("a", "b"), 1, f"{path}:1"),
        Solution("Q", ("a",), None, f"{path}:2"),
    ]


def test_a_json_array_is_read_as_process_bench_publishes_it(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps([{"problem": "P", "steps": ["a", "b"], "label": 1}], indent=2))
    assert [(one.steps, one.first_wrong) for one in read_solutions(path)] == [(("a", "b"), 1)]


def test_prm800k_is_followed_along_the_chosen_steps_to_the_first_wrong_one(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        prm(step(("a", 1)), step(("x", 0), ("b", 1), chosen=1), step(("c", 0), ("d", -1), chosen=None)),
        prm(step(("a", 1)), step(("b", -1), chosen=0)),
        prm(step(("a", 1)), step(("b", -1), chosen=None, human="B"), step(("c", 1)), reason="solution"),
        prm(step(("a", 1)), reason="give_up"),
        prm(step(("a", 1)), step(("b", None), chosen=None)),
        prm(step(("a", 1)), step(("b", 1)), reason="found_error"),  # which names no error: not a right solution
    )
    found = [(one.steps, one.first_wrong) for one in read_solutions(path)]
    assert found == [(("a", "b", "d"), 2), (("a", "b"), 1), (("a", "B", "c"), None)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        {"steps": ["a"], "label": 0},
        {"problem": "P", "steps": [], "label": -1},
        {"problem": "P", "steps": ["a"], "label": 1},
        {"problem": "P", "steps": ["a", 2], "label": 0},
        {"problem": "P", "steps": ["a", "b"], "label": True},
        {"problem": "P", "steps": ["\ud800"], "label": 0},
        {"question": {"problem": None}, "label": {"steps": [step(("a", -1))], "finish_reason": "found_error"}},
        prm(step((None, 1)), step(("b", -1))),
        prm(step(("a", 1), ("b", 1), chosen=-1), step(("c", -1))),
        {"question": {"problem": "P"}, "label": {"steps": [{}], "finish_reason": "solution"}},
    ],
)
def test_a_line_of_neither_is_refused_by_its_place(tmp_path: Path, line: object) -> None:
    good = {"problem": "P", "steps": ["a"], "label": -1}
    with pytest.raises(DataError, match=r"solutions\.jsonl:2 is not a line of ProcessBench or PRM800K"):
        read_solutions(written(tmp_path, good, line))


def test_solutions_that_are_left_out_are_counted(tmp_path: Path) -> None:
    whole = prm(step(("a", 1)), reason="solution")
    path = written(tmp_path, prm(step(("a", 1)), reason="give_up"), whole, prm(step(("a", 1))))
    said: list[str] = []
    assert [one.steps for one in read_solutions(path, report=said.append)] == [("a",)]
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [" 2 solutions are left out"]
    assert read_solutions(written(tmp_path, whole), report=said.append)
    assert len(said) == 1, "nothing is left out, so nothing is said"


def test_a_file_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labelled solution"):
        read_solutions(written(tmp_path, prm(step(("a", 1)), reason="give_up")))
    with pytest.raises(DataError, match="is empty"):
        read_solutions(written(tmp_path, ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_solutions(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"solutions\.jsonl is a git-lfs pointer, not the data"):
        read_solutions(written(tmp_path, "version https://git-lfs.github.com/spec/v1"))


def test_each_token_belongs_to_the_step_of_its_last_character() -> None:
    solution = Solution("P", ("ab", "c"), 1, "here")
    assert solution.text == "ab\n\nc"
    assert solution.spans == [(0, 4), (4, 5)]
    offsets = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    assert steps_of(solution, offsets).tolist() == [0, 0, 0, 1, 1]
    assert steps_of(solution, [(0, 5)]).tolist() == [1]
