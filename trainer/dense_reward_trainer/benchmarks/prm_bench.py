"""PRMBench (arXiv 2501.03124): its files, and its metric PRMScore, as in mr_eval of ssmisya/PRMBench.

Every step of a modified solution is judged right or wrong, and the steps of a category are counted together. PRMScore
is (F1 + negative F1) / 2: of the right steps, and of the wrong ones. As in its form_latex_strs.ipynb, the category
multi_solutions, which has no wrong step, is scored by F1 alone; the total is over the steps of all categories.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dense_reward_trainer.benchmarks.json_rows import read_rows, text, texts
from dense_reward_trainer.benchmarks.thresholds import Bools, Counts, Floats
from dense_reward_trainer.data.process_labels import SEPARATOR, Solution

ONLY_RIGHT = "multi_solutions"


@dataclass(frozen=True, slots=True)
class JudgedSteps:
    """A solution whose wrong steps are known. `id`: that of mr_eval, category and idx.

    `origin`: the question that was modified; solutions of one origin are not independent.
    """

    id: str
    category: str
    origin: str
    solution: Solution
    wrong: frozenset[int]


def read_prm_bench(path: Path, separator: str = SEPARATOR) -> list[JudgedSteps]:
    """The modified solutions of a file or folder, each once. Raises DataError, naming the row.

    A step that is blank is read as a full stop, so that it has a token; 3 of the published solutions have one.
    """
    found: dict[str, JudgedSteps] = {}
    for row in read_rows(path, "PRMBench", lambda row, source: _judged_steps(row, source, separator)):
        found.setdefault(row.id, row)
    return [*found.values()]


def _judged_steps(row: Mapping[str, object], source: str, separator: str) -> JudgedSteps:
    category, wrong, steps = text(row, "classification"), row["error_steps"], texts(row, "modified_process")
    if not isinstance(wrong, list) or not all(type(step) is int for step in wrong):
        raise TypeError("error_steps must be a list of numbers, counted from 1")
    if not steps:
        raise ValueError("modified_process has no step")
    stripped = tuple(step.strip() or "." for step in steps)
    solution = Solution(text(row, "modified_question"), stripped, None, source, separator)
    # mr_eval ignores numbers beyond the last step too; 100 of the published solutions have one
    errors = frozenset(step - 1 for step in wrong)
    return JudgedSteps(f"{category}_{text(row, 'idx')}", category, text(row, "original_question"), solution, errors)


def step_counts(solutions: Sequence[JudgedSteps]) -> Counts:
    """Counts [N, 4] of steps: right called right (TP), wrong called right (FP), wrong called wrong (TN), FN."""
    wrong_NS = np.zeros((len(solutions), max(len(one.solution.steps) for one in solutions)), dtype=np.bool_)
    for n, one in enumerate(solutions):
        wrong_NS[n, [step for step in one.wrong if 0 <= step < len(one.solution.steps)]] = True

    def counts(values_NS: Floats, threshold: float) -> Floats:
        scored_NS = ~np.isnan(values_NS)
        valid_NS: Bools = values_NS >= threshold
        wrong = wrong_NS[:, : values_NS.shape[1]]
        kinds = (valid_NS & ~wrong, valid_NS & wrong, ~valid_NS & wrong, ~valid_NS & ~wrong)
        return np.stack([(kind & scored_NS).sum(axis=1) for kind in kinds], axis=1, dtype=np.float64)

    return counts


def both_f1(sums_K: Floats) -> tuple[Floats, Floats]:
    """F1 of the right steps and of the wrong ones, [...], with mr_eval's -1 for what is undefined."""
    tp, fp, tn, fn = np.moveaxis(sums_K, -1, 0)
    return _f1(tp, fp, fn), _f1(tn, fn, fp)


def prm_score(sums_K: Floats) -> Floats:
    """(F1 + negative F1) / 2, [...]."""
    right, wrong = both_f1(sums_K)
    return (right + wrong) / 2


def _f1(hit: Floats, extra: Floats, missed: Floats) -> Floats:
    precision, recall = _ratio(hit, hit + extra), _ratio(hit, hit + missed)
    return _ratio(2 * precision * recall, precision + recall)


def _ratio(part: Floats, whole: Floats) -> Floats:
    found: Floats = np.where(whole == 0, -1.0, part / np.where(whole == 0, 1.0, whole))
    return found
