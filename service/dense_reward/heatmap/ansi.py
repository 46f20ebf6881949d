"""A heatmap for terminals: 24-bit backgrounds or, without colour, the values printed below the tokens.

Only printable characters of the text reach the terminal: every escape sequence in the output comes from this module.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dense_reward.heatmap.lines import Box, Line, boxes, flow, paragraph, token_lines
from dense_reward.heatmap.palette import STEPS, Swatch, level, palette_named, swatches
from dense_reward.heatmap.rows import Heatmap, HeatmapRow, lowest, signed, summary, tick_labels
from dense_reward.heatmap.visible import cells

SMALLEST_COLUMNS = 20

RESET = "\x1b[0m"
BOLD = "\x1b[1m"
DIM = "\x1b[2m"
_LOWEST = "\x1b[1;4m"
_BAR_COLUMNS = 33


def render_ansi(heatmap: Heatmap, *, columns: int = 100, colour: bool = True, dark: bool = True) -> str:
    """Lines of at most `columns` cells, without a final line feed. `dark`: for terminals with a dark background.

    Without `colour` there is no escape sequence. Raises ValueError for fewer than 20 columns.
    """
    if columns < SMALLEST_COLUMNS:
        raise ValueError(f"{columns} columns are too few; give at least {SMALLEST_COLUMNS}")
    painter = _Painter(heatmap, columns, colour, swatches(palette_named(heatmap.palette), dark=dark))
    return "\n".join(painter.lines())


@dataclass(frozen=True, slots=True)
class _Painter:
    heatmap: Heatmap
    columns: int
    colour: bool
    swatches: tuple[Swatch, ...]

    def lines(self) -> Iterator[str]:
        for row in self.heatmap.rows:
            yield from self._prose(row.title, BOLD)
            yield from self._prose(_stats(row), DIM)
            yield from self._prose(row.prompt, DIM)
            yield from self._painted(row) if self.colour else self._numbered(row)
            yield ""
        yield from self._legend()

    def _prose(self, text: str, style: str) -> Iterator[str]:
        yield from (self._styled(line, style) for line in paragraph(text, self.columns))

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{RESET}" if self.colour else text

    def _painted(self, row: HeatmapRow) -> Iterator[str]:
        marked = lowest(row)
        for line in flow(boxes(row.pieces, self.columns), self.columns):
            yield "".join(self._box(placed.box, row, marked) for placed in line)

    def _box(self, box: Box, row: HeatmapRow, marked: int | None) -> str:
        painted = paint(self.swatches[level(row.values[box.index], self.heatmap.scale)])
        return f"{painted}{_LOWEST if box.index == marked else ''}{box.text}{RESET}"

    def _numbered(self, row: HeatmapRow) -> Iterator[str]:
        marked = lowest(row)
        labels = [signed(value, 1) + "*" * (index == marked) for index, value in enumerate(row.values)]
        for line in flow(_columned(row, labels, self.columns), self.columns):
            yield from _two_lines(line, labels)

    def _legend(self) -> Iterator[str]:
        heatmap, unit = self.heatmap, self.heatmap.unit
        yield from self._prose(f"{heatmap.signal} per token, {unit}: {heatmap.caption}", DIM)
        if not self.colour:
            yield from self._prose("the value is printed below each token; * marks the lowest of a row", DIM)
            return
        span = min(_BAR_COLUMNS, self.columns - 2)
        steps = (round(2 * STEPS * at / (span - 1)) for at in range(span))
        bar = "".join(f"{paint(self.swatches[step])} " for step in steps)
        yield f"{bar}{RESET}"
        low, _, zero, _, high = tick_labels(heatmap.scale)
        gap = max(3, span - len(low) - len(high))
        yield from self._prose(f"{low}{zero:^{gap}}{high}", DIM)
        yield from self._prose(f"colour saturates at the ends ({unit}); the lowest token is underlined", DIM)


def paint(swatch: Swatch) -> str:
    """The escape sequence that sets a swatch's background and ink."""
    fill, ink = swatch.fill, swatch.ink
    return f"\x1b[48;2;{fill.red};{fill.green};{fill.blue};38;2;{ink.red};{ink.green};{ink.blue}m"


def _stats(row: HeatmapRow) -> str:
    numbers, marked = summary(row), lowest(row)
    text = f"{len(row.pieces)} tokens  sum {signed(numbers.sum)}"
    if numbers.mean is None or numbers.min is None or marked is None:
        return text
    token = "".join(token_lines(row.pieces[marked]))
    return f'{text}  mean {signed(numbers.mean)}  min {signed(numbers.min)} at "{token}" (#{marked})'


def _columned(row: HeatmapRow, labels: list[str], columns: int) -> Iterator[Box]:
    """Boxes that are wide enough for the value below them and a gap. Spaces become visible: padding would hide them."""
    for box in boxes(row.pieces, columns - 1):
        text = box.text.replace(" ", "␣")
        width = 1 + max(box.cells, len(labels[box.index]) * box.first)
        yield Box(box.index, text, width, box.first, box.ends_line)


def _two_lines(line: Line, labels: list[str]) -> Iterator[str]:
    above = (placed.box.text + " " * (placed.box.cells - cells(placed.box.text)) for placed in line)
    yield "".join(above).rstrip()
    below = (f"{labels[placed.box.index] * placed.box.first:{placed.box.cells}}" for placed in line)
    yield "".join(below).rstrip()
