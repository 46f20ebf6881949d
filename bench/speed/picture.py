"""Draws docs/pictures/speed.png. Knows nothing of how its numbers came about."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "service": "#1f5fa8",
    "transformers": "#c9c9c9",
    "transformers_best": "#8c8c8c",
    "vllm": "#e0a33a",
}
BAR = 0.8


def draw_speed(file: Path, speeds: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> None:
    """Response tokens a second, by workload and contestant; shares of the matmul peak, by what was varied."""
    figure = Figure(figsize=(12, 1.5 + 0.7 * max(len(speeds), len(shares) / 2, 2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_speeds(left, speeds)
    _draw_shares(right, shares)
    figure.savefig(file, dpi=120)


def _draw_speeds(axes: Axes, speeds: Mapping[str, Mapping[str, float]]) -> None:
    height = BAR / len(COLOURS)
    for number, (contestant, colour) in enumerate(COLOURS.items()):
        places = [row + number * height for row, found in enumerate(speeds.values()) if contestant in found]
        values = [found[contestant] for found in speeds.values() if contestant in found]
        bars = axes.barh(places, values, height, color=colour, label=contestant, align="edge")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    _label(axes, list(speeds), "response tokens a second")
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.margins(x=0.1)
    if speeds:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLOURS), frameon=False, fontsize=8)


def _draw_shares(axes: Axes, shares: Mapping[str, float]) -> None:
    places = [row + BAR / 4 for row in range(len(shares))]
    bars = axes.barh(places, list(shares.values()), BAR / 2, color=COLOURS["service"], align="edge")
    axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=8)
    _label(axes, list(shares), "service's share of the matmul peak, 0.5B")
    axes.set_xlim(0, 1.1)


def _label(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    axes.set_yticks([row + BAR / 2 for row in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
