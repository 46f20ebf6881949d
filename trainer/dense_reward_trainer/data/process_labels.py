"""Reads solutions in which people marked the first wrong step: rows of ProcessBench and of PRM800K.

ProcessBench (arXiv 2412.06559): {"problem", "steps": [str], "label": index of the first wrong step, -1 for none}.
PRM800K (arXiv 2305.20050): {"question": {"problem"}, "label": {"steps": [{"completions": [{"text", "rating"}],
"human_completion", "chosen_completion"}], "finish_reason"}}; a rating of -1 is wrong.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dense_reward.records import Report

from dense_reward_trainer.data.file_rows import file_rows
from dense_reward_trainer.data.records import DataError

SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution in steps. `first_wrong`: index of the first wrong step, None if all are right.

    `separator`: what stands between two steps in the response.
    """

    problem: str
    steps: tuple[str, ...]
    first_wrong: int | None
    source: str
    separator: str = SEPARATOR

    @property
    def text(self) -> str:
        """The steps as one response."""
        return self.separator.join(self.steps)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Code-point span of each step in `text`; the separator belongs to the step before it."""
        starts = [0]
        for step in self.steps[:-1]:
            starts.append(starts[-1] + len(step) + len(self.separator))
        return [*zip(starts, [*starts[1:], len(self.text)], strict=True)]


def read_solutions(path: Path, separator: str = SEPARATOR, report: Report | None = None) -> list[Solution]:
    """All labelled solutions of a file; skips those of PRM800K whose labelling is unfinished or contradicts itself.

    `separator`: that of the solutions. `report` gets the number of skipped ones. Raises DataError if a row
    has neither format, and names it.
    """
    solutions: list[Solution] = []
    skipped = 0
    for number, row in file_rows(path).rows:
        solution = _solution(row, f"{path}:{number}")
        skipped += solution is None
        solutions += [] if solution is None else [replace(solution, separator=separator)]
    if skipped and report is not None:
        report(f"{path}: {skipped} solutions are left out: their labelling is unfinished, or names no error it found")
    if not solutions:
        raise DataError(f"{path} holds no labelled solution: name a file of ProcessBench or PRM800K")
    return solutions


def _solution(line: bytes | Mapping[str, Any], source: str) -> Solution | None:
    try:
        row = json.loads(line) if isinstance(line, bytes) else line
        found = _process_bench(row, source) if "steps" in row else _prm800k(row, source)
        return None if found is None else _checked(found)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source} is not a line of ProcessBench or PRM800K ({reason})") from None


def _checked(solution: Solution) -> Solution:
    """The solution. Raises TypeError or ValueError for what is no text, or text that cannot be sent."""
    if not isinstance(solution.problem, str) or not all(isinstance(step, str) and step for step in solution.steps):
        raise TypeError("the problem and every step must be texts, and no step empty")
    "".join([solution.problem, *solution.steps]).encode()  # half of a surrogate pair is a ValueError
    return solution


def _process_bench(row: Mapping[str, object], source: str) -> Solution:
    problem, steps, label = row["problem"], row["steps"], row["label"]
    if not isinstance(problem, str) or not isinstance(steps, list) or type(label) is not int:
        raise TypeError("problem must be text, steps must be a list and label must be a number")
    if not steps or not -1 <= label < len(steps):
        raise ValueError(f"label must be an index of the {len(steps)} steps or -1, not {label}")
    return Solution(problem, tuple(steps), None if label == -1 else label, source)


def _prm800k(row: Mapping[str, dict], source: str) -> Solution | None:  # type: ignore[type-arg]
    """The steps that the labeller chose, up to the first wrong completion or to the end; None if unfinished."""
    steps: list[str] = []
    if row["label"]["finish_reason"] not in ("solution", "found_error"):
        return None
    for step in row["label"]["steps"]:
        chosen, completions = step["chosen_completion"], step["completions"] or []
        if chosen is not None and not 0 <= chosen < len(completions):
            raise ValueError(f"chosen_completion {chosen} is none of {len(completions)} completions")
        wrong = [c["text"] for c in completions if c["rating"] == -1]
        if chosen is None and step["human_completion"] is None:
            if not wrong:
                return None
            return Solution(row["question"]["problem"], (*steps, wrong[0]), len(steps), source)
        steps.append(step["human_completion"]["text"] if chosen is None else completions[chosen]["text"])
        if chosen is not None and completions[chosen]["rating"] == -1:
            return Solution(row["question"]["problem"], tuple(steps), len(steps) - 1, source)
    if row["label"]["finish_reason"] == "found_error" or not steps:  # it names no error that was found
        return None
    return Solution(row["question"]["problem"], tuple(steps), None, source)
