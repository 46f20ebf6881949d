"""A heatmap as PNG or PDF, drawn by matplotlib: for papers and reports, and for viewers that show no HTML.

The lines, colours and numbers are those of the other formats. The font is DejaVu, which matplotlib brings, so that
equal heatmaps give equal bytes; characters that it lacks are drawn in rcParams["font.sans-serif"]. Text in a PDF is
text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dense_reward.heatmap.lines import Box, Line, boxes, flow, paragraph, token_lines
from dense_reward.heatmap.palette import Swatch, level, palette_named, swatches
from dense_reward.heatmap.rows import Heatmap, HeatmapRow, lowest, summary, tick_labels, typeset

SMALLEST_WIDTH_IN = 2.0
# Lengths in points, 72 to the inch.
_SIZE, _SMALL = 8.0, 7.0
_CELL = 0.602 * _SIZE  # advance of DejaVu Sans Mono
_SMALL_CELL = 0.55 * _SMALL  # average advance of DejaVu Sans, on the wide side
_LINE, _SMALL_LINE, _GAP = 12.5, 10.0, 4.0
_BASELINE = 8.6  # from the top of a line of tokens
_MARGIN, _BAR, _LONGEST_BAR = 4.0, 6.0, 240.0
_TEXT, _DIM = "#1b1f24", "#5b6470"
# "sans-serif" is the caller's font for what DejaVu lacks, such as Chinese.
_MONO, _SANS = ["DejaVu Sans Mono", "sans-serif"], ["DejaVu Sans", "sans-serif"]


def render_file(heatmap: Heatmap, format: Literal["png", "pdf"], *, width_in: float = 6.5, dpi: int = 200) -> bytes:
    """A picture of this width, as high as its tokens need, on white. Raises ValueError for less than 2 inches."""
    if width_in < SMALLEST_WIDTH_IN:
        raise ValueError(f"a width of {width_in} inches is too small; give at least {SMALLEST_WIDTH_IN}")
    # The caller's own settings of matplotlib must not change the picture. 42: TrueType, whose text can be selected.
    fonts = matplotlib.rcParams["font.sans-serif"]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "pdf.fonttype": 42, "font.sans-serif": fonts}):
        content = BytesIO()
        # without date and version, the same heatmap gives the same bytes
        dated = {"Software": None} if format == "png" else {"CreationDate": None, "Creator": None, "Producer": None}
        _figure(heatmap, width_in).savefig(content, format=format, dpi=dpi, metadata=dated)
        return content.getvalue()


@dataclass(slots=True)
class _Sheet:
    """Axes in points, and how far down from the top edge they are filled."""

    axes: Axes
    width: float
    y: float = _MARGIN

    @property
    def columns(self) -> int:
        return int((self.width - 2 * _MARGIN) / _CELL)

    def text(self, text: str, *, x: float = _MARGIN, below: float, colour: str, size: float, family: list[str]) -> None:
        # Tokens hold dollar signs, which must not begin a formula.
        drawn = self.axes.text(x, self.y + below, text.replace(" ", "\u00a0"), va="baseline", parse_math=False)
        drawn.set(color=colour, size=size, family=family)

    def prose(self, text: str, colour: str) -> None:
        for line in paragraph(text, int((self.width - 2 * _MARGIN) / _SMALL_CELL)):
            self.text(line, below=_SMALL, colour=colour, size=_SMALL, family=_SANS)
            self.y += _SMALL_LINE


def _figure(heatmap: Heatmap, width_in: float) -> Figure:
    width = 72 * width_in
    figure = Figure(figsize=(width_in, 1.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    sheet = _Sheet(axes, width)
    colours = swatches(palette_named(heatmap.palette), dark=False)
    for row in heatmap.rows:
        _row(sheet, row, heatmap, colours)
    height = sheet.y + _BAR + 2 * _SMALL_LINE + _MARGIN
    figure.set_size_inches(width_in, height / 72)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    span = min(_LONGEST_BAR, width - 8 * _MARGIN)
    place = ((width - span) / 2 / width, 1 - (sheet.y + _BAR) / height, span / width, _BAR / height)
    _colour_bar(figure, figure.add_axes(place), heatmap, colours)
    return figure


def _row(sheet: _Sheet, row: HeatmapRow, heatmap: Heatmap, colours: Sequence[Swatch]) -> None:
    sheet.prose(_heading(row), _TEXT)
    if row.prompt:
        sheet.prose(row.prompt, _DIM)
    lines = flow(boxes(row.pieces, sheet.columns), sheet.columns)
    marked = lowest(row)
    # The outlined boxes come last: their neighbours would cover a part of the line.
    for box, x, y in sorted(_places(sheet, lines), key=lambda place: place[0].index == marked):
        colour = colours[level(row.values[box.index], heatmap.scale)]
        edge = _TEXT if box.index == marked else "white"
        size = box.cells * _CELL, _LINE - 1
        sheet.axes.add_patch(Rectangle((x, y), *size, facecolor=colour.fill.hex, edgecolor=edge, linewidth=0.6))
        sheet.text(box.text, x=x, below=y - sheet.y + _BASELINE, colour=colour.ink.hex, size=_SIZE, family=_MONO)
    sheet.y += _LINE * len(lines) + 2 * _GAP


def _places(sheet: _Sheet, lines: Sequence[Line]) -> Iterator[tuple[Box, float, float]]:
    for at, line in enumerate(lines):
        for placed in line:
            yield placed.box, _MARGIN + placed.column * _CELL, sheet.y + at * _LINE


def _heading(row: HeatmapRow) -> str:
    numbers, marked = summary(row), lowest(row)
    text = f"{row.title}: {len(row.pieces)} tokens, sum {typeset(numbers.sum)}"
    if numbers.mean is None or numbers.min is None or marked is None:
        return text
    token = "".join(token_lines(row.pieces[marked]))
    return f"{text}, mean {typeset(numbers.mean)}, min {typeset(numbers.min)} at “{token}” (outlined)"


def _colour_bar(figure: Figure, axes: Axes, heatmap: Heatmap, colours: Sequence[Swatch]) -> None:
    scale = heatmap.scale
    shades = ScalarMappable(Normalize(-scale, scale), ListedColormap([one.fill.hex for one in colours]))
    bar = figure.colorbar(shades, cax=axes, orientation="horizontal")
    bar.set_ticks([share * scale for share in (-1, -0.5, 0, 0.5, 1)], labels=list(tick_labels(scale)))
    bar.ax.tick_params(labelsize=_SMALL, labelcolor=_TEXT, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")  # matplotlib would embed more than 50 colours as an image
    label = f"{heatmap.signal.replace('_', ' ')} per token ({heatmap.unit})"
    bar.set_label(label, size=_SMALL, color=_TEXT, labelpad=1, parse_math=False)
