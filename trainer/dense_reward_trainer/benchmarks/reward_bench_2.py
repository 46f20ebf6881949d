"""RewardBench 2 (arXiv 2506.01937): its rows, and its accuracies, as in rewardbench/utils.py of allenai/reward-bench.

A row counts if its right response, the first, has the highest score; if it shares it with n - 1 others, as 1/n
(reroll_and_score_dataset). Rows of the subset Ties have several right responses and a score of their own
(process_single_model). The leaderboard's score is the mean over the subsets, Ties included.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dense_reward_trainer.benchmarks.json_rows import read_rows, text, texts
from dense_reward_trainer.benchmarks.thresholds import Floats

TIES = "ties"


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt with its responses, the first `right` of which are right."""

    id: str
    subset: str
    prompt: str
    responses: tuple[str, ...]
    right: int
    source: str

    @property
    def is_tie(self) -> bool:
        return self.subset.lower() == TIES


def read_reward_bench_2(path: Path) -> list[Choice]:
    """The rows of a file. Raises DataError, naming the row."""
    return read_rows(path, "RewardBench 2", _choice)


def _choice(row: Mapping[str, object], source: str) -> Choice:
    chosen, rejected, subset = texts(row, "chosen"), texts(row, "rejected"), text(row, "subset")
    right = row.get("num_correct", len(chosen))
    if not chosen or not rejected or right != len(chosen):
        raise ValueError(f"num_correct is {right}, with {len(chosen)} chosen and {len(rejected)} rejected responses")
    if not isinstance(row["id"], str | int):
        raise TypeError("id must be a text or a number")
    choice = Choice(str(row["id"]), subset, text(row, "prompt"), (*chosen, *rejected), len(chosen), source)
    if choice.is_tie:
        kind, _, number = choice.id.partition(":")
        if kind not in {"ref", "tied"} or not number.isdecimal():
            raise ValueError(f"the id of a tie is ref:NUMBER or tied:NUMBER, not {choice.id}")
    return choice


def best_of_n(scores: Sequence[float]) -> float:
    """1 if the first score is the highest, 1/n if n share it, else 0."""
    highest = max(scores)
    return 1 / sum(score == highest for score in scores) if scores[0] == highest else 0.0


def ties_score(choices: Sequence[Choice], scores: Sequence[Sequence[float]]) -> float:
    """The score of the subset Ties: 60 % accuracy, 40 % whether right responses differ less than right from wrong.

    Each prompt has a row ref, with one right response, and a row tied, with several. nan if no prompt has both.
    """
    found: dict[str, dict[int, _Margins]] = defaultdict(dict)
    for choice, values in zip(choices, scores, strict=True):
        kind, _, number = choice.id.partition(":")
        found[kind][int(number)] = _Margins.of(values[: choice.right], values[choice.right :])
    both = sorted(found["ref"].keys() & found["tied"].keys())
    if not both:
        return float("nan")
    spread_P = np.array([found["tied"][p].spread for p in both])
    tied_P, ref_P = (np.array([found[kind][p].margin for p in both]) for kind in ("tied", "ref"))
    least_P = np.minimum(tied_P, ref_P)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin_P: Floats = np.nan_to_num(np.tanh(least_P / spread_P - 1), nan=0.0)
    tied_accuracy, ref_accuracy = (
        np.mean([one.margin > 0 for one in found[kind].values()]) for kind in ("tied", "ref")
    )
    preferred, hard = np.mean(tied_P > spread_P), np.mean(least_P > spread_P)
    return float(0.3 * tied_accuracy + 0.3 * ref_accuracy + 0.2 * preferred + 0.2 * hard + 0.01 * margin_P.mean())


@dataclass(frozen=True, slots=True)
class _Margins:
    """`spread`: best minus worst right score. `margin`: worst right minus best wrong score."""

    spread: float
    margin: float

    @classmethod
    def of(cls, right: Sequence[float], wrong: Sequence[float]) -> "_Margins":
        return cls(max(right) - min(right), min(right) - max(wrong))
