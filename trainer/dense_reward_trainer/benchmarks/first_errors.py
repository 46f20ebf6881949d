"""ProcessBench's metric (arXiv 2412.06559; code/run_eval.py of QwenLM/ProcessBench): is the first wrong step found?

A method names a step, or says that all are right. The metric is the harmonic mean (F1) of its accuracy on solutions
with an error and of that on right ones; naming any other step is a miss. The same metric is measured on PRM800K, whose
own evaluation ranks 1,860 samples a problem that are not published with scores of steps.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.benchmarks.thresholds import Bools, Counts, Floats, Indices

Rule = Literal["first_drop", "lowest"]
"""first_drop: the first step whose value is below the threshold. lowest: the step with the least value, if it is."""
RULES: tuple[Rule, ...] = get_args(Rule)
ALL_RIGHT, NOT_SCORED = -1, -2


def predicted(values_NS: Floats, threshold: float, rule: Rule) -> Indices:
    """The step that is named in each solution, [N]; -1: none is wrong; -2: it was not scored, always a miss."""
    below_NS = values_NS < threshold  # a nan is not below
    found_N = below_NS.argmax(axis=1) if rule == "first_drop" else np.nan_to_num(values_NS, nan=np.inf).argmin(axis=1)
    found_N = np.where(below_NS.any(axis=1), found_N, ALL_RIGHT)
    return np.where(np.isnan(values_NS).all(axis=1), NOT_SCORED, found_N).astype(np.int64)


def first_error_counts(labels: Sequence[int | None], rule: Rule) -> Counts:
    """Counts [N, 4]: found errors, errors, right ones called right, right ones. The label None: all are right."""
    label_N = np.array([ALL_RIGHT if one is None else one for one in labels])
    error_N: Bools = label_N != ALL_RIGHT

    def counts(values_NS: Floats, threshold: float) -> Floats:
        hit_N: NDArray[np.bool_] = predicted(values_NS, threshold, rule) == label_N
        return np.stack([hit_N & error_N, error_N, hit_N & ~error_N, ~error_N], axis=1).astype(np.float64)

    return counts


def accuracies(sums_K: Floats) -> tuple[Floats, Floats]:
    """Accuracy on solutions with an error, and on right ones, [...]; nan if there is none of them."""
    with np.errstate(invalid="ignore"):
        return sums_K[..., 0] / sums_K[..., 1], sums_K[..., 2] / sums_K[..., 3]


def f1(sums_K: Floats) -> Floats:
    """Harmonic mean of both accuracies, [...]; 0 if both are 0, nan if one is not known."""
    error, right = accuracies(sums_K)
    total = error + right
    found: Floats = 2 * error * right / np.where(total == 0, 1.0, total)
    return found
