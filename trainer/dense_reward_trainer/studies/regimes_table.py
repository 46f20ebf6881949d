"""The regimes study as figures, a table and a picture: means over seeds with 95 % intervals, and differences to SFT.

Must not know jobs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
from matplotlib.figure import Figure

from dense_reward_trainer.credit.paired import paired_interval, share_interval

# figure -> its title
SHOWN = {
    "sampled_accuracy": "sampled accuracy",
    "greedy_accuracy": "greedy accuracy",
    "length_tokens": "length",
    "kl_to_sft": "KL to SFT",
}
SHARES = ("sampled_accuracy", "greedy_accuracy")


@dataclass(frozen=True, slots=True)
class Figures:
    """One column with one seed: accuracies on the held-out problems, tokens of sampled answers, nats per answer."""

    sampled_accuracy: float
    greedy_accuracy: float
    length_tokens: float
    kl_to_sft: float

    @classmethod
    def of(cls, metrics: Mapping[str, object]) -> Self:
        """From a result of the job `evaluate`. Raises ValueError if a figure is missing there."""
        values: dict[str, float] = {}
        for field in fields(cls):
            estimate = metrics.get(field.name)
            if not isinstance(estimate, Mapping):
                raise ValueError(f"the evaluation has no {field.name}")
            values[field.name] = float(estimate["value"])
        return cls(**values)


Cells = Sequence[Mapping[str, Figures]]


def at_matched_kl(curve: Sequence[Figures], kl: float) -> Figures:
    """The figures that the SFT model would have at a temperature where its KL is `kl`, by linear interpolation.

    `curve`: its figures at falling temperatures, so with rising KL. Beyond the last KL, it returns the last figures.
    """
    values = np.array([[getattr(one, field.name) for field in fields(Figures)] for one in curve])
    # measured KLs are noisy, and np.interp needs them to rise
    kls = np.maximum.accumulate([one.kl_to_sft for one in curve])
    return Figures(*(float(np.interp(kl, kls, column)) for column in values.T))


def summarise(cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and interval over seeds, by column and figure. `..._gain`: difference to the SFT model of the same seed."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for column in columns_of(cells):
        summary[column] = {}
        for name in SHOWN:
            values = [getattr(cell[column], name) for cell in cells]
            gains = [value - getattr(cell["sft"], name) for value, cell in zip(values, cells, strict=True)]
            found = (share_interval if name in SHARES else paired_interval)(values)
            summary[column] |= {name: asdict(found), f"{name}_gain": asdict(paired_interval(gains))}
    return summary


def columns_of(cells: Cells) -> list[str]:
    """The SFT model and its alternatives first, then the DPR runs in the order of the configuration."""
    first = ["sft", "tempered", "continued"]
    return [*first, *(name for name in cells[0] if name not in first)]


def format_table(regimes: Mapping[str, Cells]) -> str:
    """One line for every column of every regime: means, intervals in brackets, and the gain in sampled accuracy."""
    rows = [["regime", "column", *SHOWN.values(), "gain in sampled accuracy"]]
    for regime, cells in regimes.items():
        for column, figures in summarise(cells).items():
            rows.append([regime, column, *(_cell(figures[name]) for name in (*SHOWN, "sampled_accuracy_gain"))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def plot_sweep(regimes: Mapping[str, Cells], path: Path) -> None:
    """Write the accuracies of every column as a PNG: sampled above, greedy below, one panel for each regime."""
    figure = Figure(figsize=(1.5 + 3.2 * len(regimes), 7), layout="constrained")
    panels = figure.subplots(2, len(regimes), squeeze=False, sharey="row")
    for name, row in zip(("sampled_accuracy", "greedy_accuracy"), panels, strict=True):
        for axes, (regime, cells) in zip(row, regimes.items(), strict=True):
            figures = summarise(cells)
            middle = np.array([one[name]["value"] for one in figures.values()])
            spread = np.array([[one[name]["value"] - one[name]["low"] for one in figures.values()]])
            axes.errorbar(range(len(middle)), middle, yerr=np.maximum(spread, 0)[0], fmt="o", capsize=3)
            axes.axhline(middle[0], color="black", linewidth=0.7, linestyle=":")
            axes.set_xticks(range(len(middle)), list(figures), rotation=60, ha="right")
            axes.set_title(regime)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(SHOWN[name])
    figure.savefig(path, dpi=120)


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
