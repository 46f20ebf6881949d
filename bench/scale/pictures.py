"""Draws docs/pictures/scale_*.png. Must not know how the figures were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, float]
Answers = Mapping[str, Sequence[Row]]
FIXED = "fixed"
COLOURS = ("#1f5fa8", "#e0a33a", "#8c8c8c", "#3a8f5c", "#b5483a")


def draw(folder: Path, answers: Mapping[str, Answers]) -> None:
    """Draws one picture for each question."""
    drawers = {"replicas": _replicas, "queue": _queue, "cold_start": _cold_start, "routing": _routing}
    for name, drawer in drawers.items():
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        drawer(left, right, answers[name])
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"scale_{name}.png", dpi=120)


def _replicas(left: Axes, right: Axes, answers: Answers) -> None:
    _latencies(left, answers, "replicas")
    rows = next(iter(answers.values()))
    left.plot(_of(rows, "replicas"), _of(rows, "formula_s"), color="black", linewidth=0.8, label="formula, one job")
    _label(left, "replicas", "seconds of a step", logs="xy")
    for colour, (name, found) in zip(COLOURS, answers.items(), strict=False):
        right.plot(_of(found, "replicas"), _of(found, "refused_share"), "o-", color=colour, label=name)
    _label(right, "replicas", "share of attempts that are refused (429)", logs="x")


def _queue(left: Axes, right: Axes, answers: Answers) -> None:
    _latencies(left, answers, "bound_s")
    _label(left, "bound of a replica's queue, seconds of work", "seconds of a step", logs="x")
    for colour, (name, found) in zip(COLOURS, answers.items(), strict=False):
        for share, style in (("refused_share", "o-"), ("hung_up_share", "s--"), ("failed_steps_share", "^:")):
            label = f"{share.removesuffix('_share').replace('_', ' ')}: {name}"
            right.plot(_of(found, "bound_s"), _of(found, share), style, color=colour, label=label)
    _label(right, "bound of a replica's queue, seconds of work", "share of attempts; of steps", logs="x")


def _cold_start(left: Axes, right: Axes, answers: Answers) -> None:
    scaled = {name: rows for name, rows in answers.items() if name != FIXED}
    _latencies(left, scaled, "cold_start_s")
    for colour, (name, rows) in zip(COLOURS, scaled.items(), strict=False):
        right.plot(
            _of(rows, "paid_s_per_step"), _of(rows, "step_p50_s"), "o-", color=colour, label=f"autoscaled, {name}"
        )
        _numbered(right, rows, "cold_start_s", "{:.0f} s")
    fixed = answers[FIXED]
    right.plot(_of(fixed, "paid_s_per_step"), _of(fixed, "step_p50_s"), "s--", color="black", label="replicas, fixed")
    _numbered(right, fixed, "replicas", "{:.0f}")
    _label(left, "seconds until a new replica is ready", "seconds of a step")
    _label(right, "paid seconds of replicas for a step", "median seconds of a step", logs="x")


def _numbered(axes: Axes, rows: Sequence[Row], name: str, form: str) -> None:
    for row in rows:
        place = (row["paid_s_per_step"], row["step_p50_s"])
        axes.annotate(form.format(row[name]), place, xytext=(4, 4), textcoords="offset points", fontsize=7)


def _routing(left: Axes, right: Axes, answers: Answers) -> None:
    for colour, (name, rows) in zip(COLOURS, answers.items(), strict=True):
        left.plot(_of(rows, "responses"), _of(rows, "computed_per_scored"), "o-", color=colour, label=name)
        right.plot(_of(rows, "responses"), _of(rows, "step_p50_s"), "o-", color=colour, label=name)
    _label(left, "responses to a prompt", "tokens computed for each that is scored", logs="x")
    _label(right, "responses to a prompt", "median seconds of a step", logs="x")


def _latencies(axes: Axes, answers: Answers, over: str) -> None:
    for colour, (name, rows) in zip(COLOURS, answers.items(), strict=False):
        axes.plot(_of(rows, over), _of(rows, "step_p50_s"), "o-", color=colour, label=f"{name}: p50")
        axes.plot(_of(rows, over), _of(rows, "step_p99_s"), "o:", color=colour, label=f"{name}: p99")


def _of(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _label(axes: Axes, xlabel: str, ylabel: str, logs: str = "") -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if "x" in logs:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if "y" in logs:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
