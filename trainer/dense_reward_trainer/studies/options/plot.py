"""The estimator study as one picture: the regret over steps and over scored tokens.

Must not know how estimators work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dense_reward_trainer.runs.pictures import write_picture
from dense_reward_trainer.studies.options.config import Curve

FLOOR, CEILING = 1e-3, 1.5


def plot_study(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Write a PNG with one line per estimator, its mean over the seeds. The legend starts with the best."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    by_step, by_tokens = figure.subplots(1, 2, sharey=True)
    regrets = {name: 1 - np.mean([curve.gap_closed for curve in found], axis=0) for name, found in curves.items()}
    names = sorted(regrets, key=lambda name: float(regrets[name][-1]))
    colours = colormaps["turbo"](np.linspace(0.02, 0.98, len(names)))
    for name, colour in zip(names, colours, strict=True):
        regret = np.maximum(regrets[name], FLOOR)
        tokens = np.mean([curve.scored_tokens for curve in curves[name]], axis=0)
        by_step.plot(curves[name][0].steps, regret, color=colour, linewidth=1.2)
        by_tokens.plot(tokens[1:], regret[1:], color=colour, linewidth=1.2, label=f"{name} ({1 - regret[-1]:.2f})")
    by_step.set_yscale("log")
    by_step.set_ylim(top=CEILING)  # a regret above 1 is worse than the SFT model: cut off, to leave room for the others
    by_step.set_ylabel("regret: share of the gap to the optimum that is left")
    by_step.set_xlabel("step")
    by_tokens.set_xscale("log")
    by_tokens.set_xlabel("scored tokens, candidates counted")
    for axes in (by_step, by_tokens):
        axes.grid(alpha=0.3, which="both")
        axes.axhline(0.05, color="black", linewidth=0.6, linestyle=":")
    figure.legend(
        *by_tokens.get_legend_handles_labels(), loc="outside right upper", title="gap closed", fontsize="small"
    )
    write_picture(figure, path)
