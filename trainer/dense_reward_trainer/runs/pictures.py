"""Writes a figure as PNG or SVG, whole or not at all, so that a full disk leaves the earlier picture.

A panel without data says why: an empty frame looks like a fault.
"""

from io import BytesIO
from pathlib import Path
from textwrap import fill

from dense_reward.checkpoints.atomic_file import write_whole
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def write_picture(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes the format that the suffix of `path` names. `dpi`: dots per inch of a PNG."""
    content, kind = BytesIO(), path.suffix.removeprefix(".")
    # without the date, a picture of the same figures has the same bytes
    figure.savefig(content, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, content.getvalue())


def without_data(axes: Axes, why: str) -> None:
    """Shows a sentence in the place of data; the title stays."""
    axes.text(0.5, 0.5, fill(why, 40), transform=axes.transAxes, ha="center", va="center", color="#555555")
    axes.set_xticks([])
    axes.set_yticks([])
