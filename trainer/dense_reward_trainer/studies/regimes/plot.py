"""Pictures of the regimes study, each as PNG and SVG. Must not know jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import share_interval
from dense_reward_trainer.runs.pictures import write_picture
from dense_reward_trainer.studies.regimes.table import METRICS, Cells, Place, summarise

FORMATS = (".png", ".svg")


def plot_policies(regimes: Mapping[str, Cells], path: Path) -> None:
    """The accuracies of every policy: sampled above, greedy below, one panel for each regime; dotted: the SFT model."""
    widths = [1.2 + 0.25 * len(cells[0].policies) for cells in regimes.values()]
    figure = Figure(figsize=(1.5 + sum(widths), 7), layout="constrained")
    panels = figure.subplots(
        2, len(regimes), squeeze=False, sharey="row", sharex="col", gridspec_kw={"width_ratios": widths}
    )
    for name, row in zip(METRICS, panels, strict=True):
        for axes, (regime, cells) in zip(row, regimes.items(), strict=True):
            _draw_policies(axes, summarise(cells), name)
            axes.set_title(regime)
        row[0].set_ylabel(METRICS[name])
    save(figure, path)


def plot_boundary(places: Mapping[str, Place], path: Path, primary: str) -> None:
    """Gain in sampled accuracy against the quality of the demonstrations less that of the start."""
    ordered = sorted(places.items(), key=lambda pair: pair[1].shift.value)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shift, gain = [one.shift for _, one in ordered], [one.gain for _, one in ordered]
    axes.errorbar(
        [one.value for one in shift],
        [one.value for one in gain],
        xerr=_errors(shift),
        yerr=_errors(gain),
        fmt="o-",
        capsize=3,
    )
    axes.axhline(0, color="black", linewidth=0.7)
    axes.axvline(0, color="black", linewidth=0.7, linestyle=":")
    axes.set_xlabel("right demonstrations - right samples of the model that SFT starts from")
    axes.set_ylabel(f"sampled accuracy: {primary} - SFT")
    axes.grid(alpha=0.3)
    save(figure, path)


def plot_series(
    regimes: Mapping[str, Cells], names: Sequence[str], positions: Sequence[float], label: str, path: Path
) -> None:
    """Accuracies of policies that differ in one option, against its value; dotted: the SFT model."""
    figure = Figure(figsize=(1 + 5 * len(regimes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    for axes, (regime, cells) in zip(panels, regimes.items(), strict=True):
        for index, (metric, title) in enumerate(METRICS.items()):
            found = [share_interval([cell.policies[name].accuracy(metric) for cell in cells]) for name in names]
            colour = f"C{index}"
            axes.errorbar(
                positions,
                [one.value for one in found],
                yerr=_errors(found),
                marker="o",
                capsize=3,
                label=title,
                color=colour,
            )
            sft = float(np.mean([cell.policies["sft"].accuracy(metric) for cell in cells]))
            axes.axhline(sft, color=colour, linewidth=0.9, linestyle=":")
        axes.set_title(regime)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy; dotted: SFT")
    panels[0].legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the figure beside `path` in every format."""
    for suffix in FORMATS:
        write_picture(figure, path.with_suffix(suffix))


def _draw_policies(axes: Axes, summary: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> None:
    shown = {policy: Interval(**figures[name]) for policy, figures in summary.items() if name in figures}
    places = [list(summary).index(policy) for policy in shown]
    found = list(shown.values())
    axes.errorbar(places, [one.value for one in found], yerr=_errors(found), fmt="o", capsize=3)
    axes.axhline(shown["sft"].value, color="black", linewidth=0.7, linestyle=":")
    axes.set_xticks(range(len(summary)), list(summary), rotation=60, ha="right")
    axes.grid(alpha=0.3)


def _errors(found: Sequence[Interval]) -> list[list[float]]:
    """Distances of the ends of the intervals from their values, as matplotlib takes them."""
    return [[max(one.value - one.low, 0.0) for one in found], [max(one.high - one.value, 0.0) for one in found]]
