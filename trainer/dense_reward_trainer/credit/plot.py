"""The credit benchmark as one picture: error localisation, ranking and calibration."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward_trainer.credit.answer_ranking import Ranking
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.error_localisation import Localisation

COLOURS = {"sft_logprob": "#444444", "reward": "#c03a2b", "centred": "#2c6fbb"}


def plot_credit(
    localisation: Mapping[str, Mapping[str, Localisation]],
    ranking: Mapping[str, Ranking] | None,
    steps: Mapping[str, Localisation] | None,
    path: Path,
) -> None:
    """Write AUROC and hit@1 of every group of errors, the ranking's AUROC, and its calibration, as a PNG."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    areas, hits, reliability = figure.subplots(1, 3)
    groups = dict(localisation) | ({} if steps is None else {"first wrong step": steps})
    ranked = {} if ranking is None else {"right above wrong": {name: one.auroc for name, one in ranking.items()}}
    _bars(areas, {title: {n: one.auroc for n, one in found.items()} for title, found in groups.items()} | ranked)
    areas.set_title("AUROC")
    areas.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    _bars(hits, {title: {n: one.hit for n, one in found.items()} for title, found in groups.items()})
    hits.set_title("hit@1: the error is the lowest of its answer")
    reliability.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name, one in (ranking or {}).items():
        if one.calibration is not None:
            label = f"{name} (error {one.calibration.expected_error:.3f})"
            points = one.calibration.probability, one.calibration.share
            reliability.plot(*points, marker="o", color=COLOURS.get(name), label=label)
    reliability.set_xlabel("P(right), from the sum over the answer")
    reliability.set_ylabel("share that is right")
    reliability.set_title("calibration on answers that were not used to fit it")
    if reliability.get_legend_handles_labels()[0]:
        reliability.legend()
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        present = [(x, found[name]) for x, found in enumerate(groups.values()) if name in found]
        values = np.array([one.value for _, one in present])
        spread = np.array([[one.value - one.low, one.high - one.value] for _, one in present]).T
        at = np.array([x for x, _ in present]) + (place - (len(names) - 1) / 2) * width
        axes.bar(at, values, width, yerr=np.maximum(spread, 0), color=COLOURS.get(name), label=name, capsize=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.02)
    if names:
        axes.legend(loc="lower right")
