"""One answer as a picture, right and with a planted error, its tokens coloured by reward, as in the paper's Figure 1.

A column of the picture is an answer, a row is a reward. Both answers of a row share one scale of colours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dense_reward.records import FloatArray
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dense_reward_trainer.runs.pictures import write_picture

FORMATS = (".png", ".svg")
COLOURS = colormaps["RdBu_r"]  # red: high reward, as in the paper; blue: low
MAX_CHARACTERS = 60
"""Longer lines of an answer are wrapped in the picture."""


@dataclass(frozen=True, slots=True, eq=False)
class ShownAnswer:
    """The text of an answer, the code-point span of each of its T tokens, and each reward, [T]."""

    text: str
    offsets: Sequence[tuple[int, int]]
    rewards: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A right answer and the same with an error; `error`: the index of the first wrong token."""

    right: ShownAnswer
    wrong: ShownAnswer
    error: int


def plot_example(example: Example, path: Path) -> None:
    """Write the picture beside `path` as PNG and SVG."""
    names = list(example.right.rewards)
    height = sum(1 for _ in drawn_pieces(example.wrong)[1]) * 0.28 + 0.5
    figure = Figure(figsize=(14, max(1.2, height) * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, panels, strict=True):
        both = np.concatenate([example.right.rewards[name], example.wrong.rewards[name]])
        largest = max(float(np.abs(both).max()), 1e-6)
        scale = TwoSlopeNorm(0.0, -largest, largest)
        _draw(left, example.right, name, scale, None)
        _draw(right, example.wrong, name, scale, example.error)
        left.set_title(f"{name}: right", loc="left")
        right.set_title("one error, framed", loc="left")
    for suffix in FORMATS:
        write_picture(figure, path.with_suffix(suffix))


def _draw(axes: Axes, answer: ShownAnswer, name: str, scale: TwoSlopeNorm, error: int | None) -> None:
    """Boxes of characters in a grid, one box for each piece of a token on a line."""
    places, lines = drawn_pieces(answer)
    for token, row, column, piece in places:
        value = float(answer.rewards[name][token])
        edge, width = ("black", 2.0) if token == error else ("white", 0.5)
        box = Rectangle((column, -row - 0.45), len(piece), 0.9, facecolor=COLOURS(scale(value)))
        box.set(edgecolor=edge, linewidth=width, zorder=2 if token == error else 1)
        axes.add_patch(box)
        dark = abs(scale(value) - 0.5) > 0.35
        axes.text(
            column + len(piece) / 2,
            -row,
            piece.replace("$", r"\$"),
            ha="center",
            va="center",
            family="monospace",
            fontsize=9,
            color="white" if dark else "black",
        )
    axes.set_xlim(0, max(*lines, 1))
    axes.set_ylim(-len(lines) + 0.5, 0.5)
    axes.axis("off")


def drawn_pieces(answer: ShownAnswer) -> tuple[list[tuple[int, int, int, str]], list[int]]:
    """For each piece of a token on one line: token, line, first character in the line, text; and the lines' lengths."""
    places: list[tuple[int, int, int, str]] = []
    lines = [0]
    for token, (start, end) in enumerate(answer.offsets):
        for index, piece in enumerate(answer.text[start:end].split("\n")):
            if index or lines[-1] + len(piece) > MAX_CHARACTERS:
                lines.append(0)
            if piece:
                places.append((token, len(lines) - 1, lines[-1], piece))
                lines[-1] += len(piece)
    return places, lines
