"""Draws the statistics: medians, and the ranges that hold half and nine tenths of the values."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward.bulk.stats.collected import Collected
from dense_reward.bulk.stats.quantiles import Distribution


def draw(collected: Collected, path: Path) -> None:
    """Write the picture; its suffix chooses the format."""
    panels = (
        ("reward by position in the response", "tokens before it", collected.positions),
        ("mean reward of a response by its length", "tokens", collected.lengths),
        ("reward by class of token", "class, and number of tokens", _counted(collected.classes)),
    )
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    panel_axes = figure.subplots(1, 3)
    for axes, (title, unit, rows) in zip(panel_axes, panels, strict=True):
        _panel(axes, title, unit, rows)
    figure.legend(*panel_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def _counted(rows: Sequence[tuple[str, Distribution]]) -> list[tuple[str, Distribution]]:
    return [(f"{name} ({d.count:,})", d) for name, d in rows]


def _panel(axes: Axes, title: str, unit: str, rows: Sequence[tuple[str, Distribution]]) -> None:
    places = range(len(rows))
    outer = [(d.p5, d.p95) for _, d in rows]
    inner = [(d.p25, d.p75) for _, d in rows]
    if rows:
        axes.vlines(places, *zip(*outer, strict=True), color="tab:blue", alpha=0.4, label="5 % to 95 %")
        axes.vlines(places, *zip(*inner, strict=True), color="tab:blue", linewidth=5, label="25 % to 75 %")
        axes.plot(places, [d.p50 for _, d in rows], "o", color="black", markersize=4, label="median")
    else:
        axes.text(0.5, 0.6, "no scored token", transform=axes.transAxes, ha="center", color="#555555")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(list(places), [name for name, _ in rows], rotation=45, ha="right")
    axes.set_xlabel(unit)
    axes.set_ylabel("nats")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
