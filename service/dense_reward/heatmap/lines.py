"""Lays tokens out on lines of monospace cells, for SVG and terminal pictures.

Knows nothing of colours, values or output formats.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dense_reward.heatmap.visible import cells, visible_lines

EMPTY = "·"  # shown for a token without text


@dataclass(frozen=True, slots=True)
class Box:
    """A part of one token on one line. `index`: the token. `first`: this is the token's first box."""

    index: int
    text: str
    cells: int
    first: bool
    ends_line: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A box and its column, in cells from the left."""

    box: Box
    column: int


Line = tuple[Placed, ...]


def token_lines(piece: str) -> tuple[str, ...]:
    """The visible text of a token, cut after line feeds. Never empty.

    The first `piece.count("\\n")` parts end a line.
    """
    if piece == "":
        return (EMPTY,)
    lines = visible_lines(piece)
    return lines if lines[-1] else lines[:-1]


def boxes(pieces: Iterable[str], columns: int) -> Iterator[Box]:
    """The boxes of all tokens in order, cut after each line feed and at the width of a line."""
    for index, piece in enumerate(pieces):
        line_feeds = piece.count("\n")
        for number, line in enumerate(token_lines(piece)):
            *full, last = _chunks(line, columns)
            for place, chunk in enumerate(full):
                yield Box(index, chunk, cells(chunk), first=number + place == 0, ends_line=False)
            yield Box(index, last, cells(last), first=number + len(full) == 0, ends_line=number < line_feeds)


def flow(stream: Iterable[Box], columns: int) -> list[Line]:
    """Places boxes side by side. A new line begins if a box does not fit, and after each box that ends its line."""
    lines: list[Line] = []
    line: list[Placed] = []
    column = 0
    for box in stream:
        if line and column + box.cells > columns:
            lines.append(tuple(line))
            line, column = [], 0
        line.append(Placed(box, column))
        column += box.cells
        if box.ends_line:
            lines.append(tuple(line))
            line, column = [], 0
    return [*lines, tuple(line)] if line else lines


def paragraph(text: str, columns: int) -> list[str]:
    """Visible text on lines of at most `columns` cells, broken after line feeds and, if possible, at spaces."""
    *words, last = text.split(" ")
    lines = flow(boxes([*(word + " " for word in words), *([last] if last else [])], columns), columns)
    return ["".join(placed.box.text for placed in line) for line in lines]


def _chunks(text: str, columns: int) -> Iterator[str]:
    start = width = 0
    for end, character in enumerate(text):
        if width + cells(character) > columns and end > start:
            yield text[start:end]
            start, width = end, 0
        width += cells(character)
    yield text[start:]
