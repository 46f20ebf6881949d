"""A preview as one picture: how the rewards rank answers, and what policies tilted by them gain. Must not know jobs."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.preview.gains import SFT, Gains
from dense_reward_trainer.preview.ranking import AGGREGATES, Ranked
from dense_reward_trainer.preview.verdict import Kind, Verdict, titled
from dense_reward_trainer.runs.pictures import without_data, write_picture

# Okabe and Ito's colours; grey is what needs no reference.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY, DARK = "#9a9a9a", "#333333"
VERDICT_COLOURS: dict[Kind, str] = {"gain": "#00795a", "control": "#8a6100", "no": "#b03a00", "unknown": "#555555"}


def plot_preview(ranking: Sequence[Ranked], gains: Gains | None, found: Verdict, stem: Path) -> None:
    """Writes the picture as `stem` with .png and .svg; both are the same for the same figures."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    ranks, shares = figure.subplots(1, 2, width_ratios=(1, 1))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(found.references)}
    _ranks(ranks, ranking, colours)
    _shares(shares, gains, colours, found.reference)
    figure.suptitle(
        fill(found.reason, 140),
        color=VERDICT_COLOURS[found.verdict],
        fontsize=11,
    )
    with mpl.rc_context({"svg.hashsalt": "preview"}):
        write_picture(figure, stem.with_suffix(".svg"))
    write_picture(figure, stem.with_suffix(".png"), dpi=140)


def _ranks(axes: Axes, ranking: Sequence[Ranked], colours: dict[str, str]) -> None:
    """The best signal by every aggregate: of the SFT model alone in grey, of each reference in its colour."""
    references: list[str | None] = [None, *colours]
    for place, reference in enumerate(references):
        label = "best signal of SFT alone" if reference is None else f"best signal, {titled(reference)}"
        found = [_best(ranking, reference, how) for how in AGGREGATES]
        shown = [(x, one.auroc) for x, one in enumerate(found) if one is not None]
        if shown:
            at = [x + (place - (len(references) - 1) / 2) * 0.7 / len(references) for x, _ in shown]
            intervals = [interval for _, interval in shown]
            colour = GREY if reference is None else colours[reference]
            axes.errorbar(
                at, [one.value for one in intervals], yerr=_spread(intervals), fmt="o", color=colour, label=label,
                capsize=3, markersize=7,
            )  # fmt: skip
    axes.set_title("Does it rank right above wrong answers?")
    if not ranking:
        without_data(axes, "nothing to rank: right and wrong answers are needed")
        return
    axes.axhline(0.5, color=DARK, linewidth=0.9, linestyle=":")
    axes.text(-0.45, 0.51, "chance", color=DARK, fontsize=9)
    axes.set_xticks(range(len(AGGREGATES)), [how.replace("_", " ") for how in AGGREGATES])
    axes.set_xlim(-0.5, len(AGGREGATES) - 0.5)
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("AUROC")
    axes.grid(axis="y", alpha=0.25)
    _open(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)


def _best(ranking: Sequence[Ranked], reference: str | None, how: str) -> Ranked | None:
    own = [one for one in ranking if one.reference == reference and one.aggregate == how]
    return max(own, key=lambda one: one.auroc.value, default=None)


def _shares(axes: Axes, gains: Gains | None, colours: dict[str, str], chosen: str | None) -> None:
    """A bar for each policy, the SFT model on top; a line marks its share."""
    axes.set_title("Would following it give more right answers?")
    if gains is None:
        without_data(axes, "not known: too few prompts have several answers")
        return
    bars = [(name, share, DARK if name == SFT else GREY) for name, share in gains.free.items()]
    for name, gain in gains.tilted.items():
        bars.append((f"tilted, {name}", gain.share, colours[name]))
        if gain.greedy is not None:
            bars.append((f"tilted, {name}, greedy", gain.greedy, colours[name]))
    chosen_bar = f"tilted, {chosen}"
    for y, (name, share, colour) in enumerate(bars):
        axes.barh(y, share.value, color=colour, height=0.68, xerr=_spread([share]), ecolor=DARK, capsize=3)
        axes.text(1.02, y, f"{share.value:.2f}", va="center", fontweight="bold" if name == chosen_bar else "normal")
    axes.axvline(gains.free[SFT].value, color=DARK, linewidth=0.9, linestyle=":")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == chosen_bar else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of right answers, {gains.prompts} prompts, 95 % intervals")
    _open(axes)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _spread(found: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the error bars below and above the values."""
    return [[max(one.value - one.low, 0.0) for one in found], [max(one.high - one.value, 0.0) for one in found]]
