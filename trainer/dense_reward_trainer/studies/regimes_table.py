"""The regimes study as figures, a table and a picture: means over seeds with 95 % intervals, and differences to SFT.

Must not know jobs or files but the picture's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Self

import numpy as np
from matplotlib.figure import Figure

from dense_reward_trainer.credit.auroc import Interval

# two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
SHOWN = {
    "sampled_accuracy": "sampled accuracy",
    "greedy_accuracy": "greedy accuracy",
    "length_tokens": "length",
    "kl_to_sft": "KL to SFT",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One column of one seed: shares of held-out problems, tokens of sampled answers, nats per answer."""

    sampled_accuracy: float
    greedy_accuracy: float
    length_tokens: float
    kl_to_sft: float

    @classmethod
    def of(cls, measured: Mapping[str, object]) -> Self:
        """From a result of the job `evaluate`. Raises ValueError where a figure is missing from it."""
        values: dict[str, float] = {}
        for field in fields(cls):
            estimate = measured.get(field.name)
            if not isinstance(estimate, Mapping):
                raise ValueError(f"the evaluation has no {field.name}")
            values[field.name] = float(estimate["value"])
        return cls(**values)


Cells = Sequence[Mapping[str, Figures]]


def at_matched_kl(curve: Sequence[Figures], kl: float) -> Figures:
    """Between the two neighbours of a falling temperature whose KLs enclose `kl`, by straight lines.

    Beyond the coldest the coldest counts: sampling cannot go further than that.
    """
    values = np.array([[getattr(one, field.name) for field in fields(Figures)] for one in curve])
    kls = np.maximum.accumulate([one.kl_to_sft for one in curve])
    return Figures(*(float(np.interp(kl, kls, column)) for column in values.T))


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t over the seeds. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two seeds, there is {len(values)}")
    mean = float(np.mean(values))
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    half = t * float(np.std(values, ddof=1)) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def summary(cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """By column and figure: mean and interval over seeds; `..._gain` is the difference to the SFT model, by seed."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for column in columns_of(cells):
        out[column] = {}
        for name in SHOWN:
            values = [getattr(cell[column], name) for cell in cells]
            gains = [value - getattr(cell["sft"], name) for value, cell in zip(values, cells, strict=True)]
            for title, found in ((name, interval(values)), (f"{name}_gain", interval(gains))):
                out[column][title] = {"value": found.value, "low": found.low, "high": found.high}
    return out


def columns_of(cells: Cells) -> list[str]:
    """SFT and its alternatives first, then the DPR runs in their order."""
    first = ["sft", "tempered", "continued"]
    return [*first, *(name for name in cells[0] if name not in first)]


def table(found: Mapping[str, Cells]) -> str:
    """For every regime one line to a column: means, intervals in brackets, and the gain in sampled accuracy."""
    rows = [["regime", "column", *SHOWN.values(), "gain in sampled accuracy"]]
    for regime, cells in found.items():
        for column, figures in summary(cells).items():
            rows.append([regime, column, *(_cell(figures[name]) for name in (*SHOWN, "sampled_accuracy_gain"))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def plot_sweep(found: Mapping[str, Cells], path: Path) -> None:
    """Sampled and greedy accuracy of every column, a row of panels for each, a panel for each regime, as a PNG."""
    figure = Figure(figsize=(1.5 + 3.2 * len(found), 7), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharey="row")
    for name, row in zip(("sampled_accuracy", "greedy_accuracy"), panels, strict=True):
        for axes, (regime, cells) in zip(row, found.items(), strict=True):
            figures = summary(cells)
            middle = np.array([one[name]["value"] for one in figures.values()])
            spread = np.array([[one[name]["value"] - one[name]["low"] for one in figures.values()]])
            axes.errorbar(range(len(middle)), middle, yerr=np.maximum(spread, 0)[0], fmt="o", capsize=3)
            axes.axhline(middle[0], color="black", linewidth=0.7, linestyle=":")
            axes.set_xticks(range(len(middle)), list(figures), rotation=60, ha="right")
            axes.set_title(regime)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(SHOWN[name])
    figure.savefig(path, dpi=120)


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
