"""The credit benchmark as one picture: error localisation, ranking by signal and aggregate, and calibration."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.error_localisation import Localisation
from dense_reward_trainer.credit.judged_answers import AGGREGATES, Rankings
from dense_reward_trainer.credit.references import pair_of
from dense_reward_trainer.credit.verdict import Choice, Verdict
from dense_reward_trainer.runs.pictures import without_data, write_picture

# Colour universal design (Okabe and Ito): signals of the SFT model alone are grey.
GREYS = ("#222222", "#555555", "#888888", "#bbbbbb")
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#8fd6bf", "#cc79a7", "#e6bcd3")
MARKERS: Mapping[Aggregate, str] = {"sum": "o", "mean": "s", "min": "v", "window_min": "D"}


def plot_credit(
    localisation: Mapping[str, Mapping[str, Localisation]],
    ranking: Rankings | None,
    verdict: Verdict | None,
    steps: Mapping[str, Localisation] | None,
    path: Path,
    *,
    not_ranked: str | None = None,
) -> None:
    """Write AUROC and hit@1 of every group of errors, and AUROC and calibration of the ranking, as a PNG.

    `not_ranked`: why there is no ranking; null if no policy was sampled.
    """
    figure = Figure(figsize=(15, 9), layout="constrained")
    (areas, hits), (ranks, reliability) = figure.subplots(2, 2)
    groups = dict(localisation) | ({} if steps is None else {"first wrong step": steps})
    _bars(areas, {title: {n: one.auroc for n, one in found.items()} for title, found in groups.items()})
    areas.set_title("AUROC: the error below the other tokens of its answer")
    areas.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    _bars(hits, {title: {n: one.hit for n, one in found.items()} for title, found in groups.items()})
    hits.set_title("hit@1: the error is the lowest of its answer")
    handles, columns = areas.get_legend_handles_labels()
    figure.legend(handles, columns, loc="outside upper center", ncols=max(1, min(len(columns), 8)), fontsize="small")
    ranks.set_title("AUROC: right above wrong samples, by aggregate")
    reliability.set_title("calibration on answers that were not used to fit it: the best of each")
    why = not_ranked or "no answers were sampled: set policy"
    if ranking is None:
        without_data(ranks, why)
    else:
        _aggregates(ranks, ranking)
    if ranking is None or verdict is None:
        without_data(reliability, why if ranking is None else "no verdict, so no best signals")
    else:
        _calibration(reliability, ranking, [verdict.control, *(one.best for one in verdict.references.values())])
    write_picture(figure, path)


def colours(columns: Iterable[str]) -> dict[str, str]:
    """A colour for each column; with many references, colours recur."""
    alone: list[str] = []
    compared: list[str] = []
    for column in columns:
        (alone if pair_of(column) is None else compared).append(column)
    greys = {column: GREYS[i % len(GREYS)] for i, column in enumerate(alone)}
    return greys | {column: COLOURS[i % len(COLOURS)] for i, column in enumerate(compared)}


def _aggregates(axes: Axes, ranking: Rankings) -> None:
    for place, name in enumerate(AGGREGATES):
        found = [one[name].auroc for one in ranking.values()]
        at = np.arange(len(found)) + (place - (len(AGGREGATES) - 1) / 2) * 0.15
        axes.errorbar(at, [one.value for one in found], yerr=_spread(found), fmt=MARKERS[name], label=name, capsize=2)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ranking)), list(ranking), rotation=20, ha="right")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower right", fontsize="small")


def _calibration(axes: Axes, ranking: Rankings, choices: Iterable[Choice]) -> None:
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for choice in choices:
        found = ranking[choice.column][choice.aggregate].calibration
        if found is not None:
            label = f"{choice.column} by {choice.aggregate} (error {found.expected_error:.3f})"
            colour = colours(ranking)[choice.column]
            axes.plot(found.probability, found.share, marker="o", color=colour, label=label)
    axes.set_xlabel("P(right), from the aggregate over the answer")
    axes.set_ylabel("share that is right")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    else:
        without_data(axes, "too few answers to fit a calibration and test it on others")


def _bars(axes: Axes, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    columns = list(dict.fromkeys(column for found in groups.values() for column in found))
    width = 0.8 / max(len(columns), 1)
    for place, (column, colour) in enumerate((column, colours(columns)[column]) for column in columns):
        present = [(x, found[column]) for x, found in enumerate(groups.values()) if column in found]
        at = np.array([x for x, _ in present]) + (place - (len(columns) - 1) / 2) * width
        found = [one for _, one in present]
        axes.bar(at, [one.value for one in found], width, yerr=_spread(found), color=colour, label=column, capsize=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.02)
    if not columns:
        without_data(axes, "no errors were planted, and no labelled solutions were given")


def _spread(found: Iterable[Interval]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Lengths of the error bars below and above the values, [2, N]."""
    return np.maximum([[one.value - one.low, one.high - one.value] for one in found], 0.0).T
