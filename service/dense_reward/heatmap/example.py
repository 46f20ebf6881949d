"""One chat as its tokens, for terminals: what is context, what is scored, and where the turn ends.

Only printable characters of the text reach the terminal: every escape sequence in the output comes from `ansi`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dense_reward.heatmap.ansi import BOLD, DIM, RESET, SMALLEST_COLUMNS, paint
from dense_reward.heatmap.lines import Box, boxes, flow, paragraph
from dense_reward.heatmap.palette import DEFAULT_PALETTE, STEPS, palette_named, swatches

_BOUNDARY = "|"
"""Ends a token where there is no colour."""
_INDENT = "  "


@dataclass(frozen=True, slots=True)
class ExampleTokens:
    """The text of each token of a prompt, of the response to it, and of what ends the turn."""

    prompt: tuple[str, ...]
    response: tuple[str, ...]
    end: tuple[str, ...]


def render_example(example: ExampleTokens, *, columns: int = 100, colour: bool) -> str:
    """Lines of at most `columns` cells, without a final line feed.

    With `colour`, neighbouring tokens have different shades: the prompt is dim, the response blue, the end of turn red.
    Without it there is no escape sequence, and a mark ends each token. Raises ValueError for fewer than 20 columns.
    """
    if columns < SMALLEST_COLUMNS:
        raise ValueError(f"{columns} columns are too few; give at least {SMALLEST_COLUMNS}")
    parts = (
        ("prompt (context, not scored):", example.prompt, _dim()),
        ("response (scored):", example.response, _shades(STEPS + STEPS // 3, STEPS + STEPS // 2)),
        ("end of turn (scored):", example.end, _shades(STEPS // 3, STEPS // 2)),
    )
    return "\n".join(line for title, pieces, shades in parts for line in _part(title, pieces, shades, columns, colour))


def _part(title: str, pieces: Sequence[str], shades: tuple[str, str], columns: int, colour: bool) -> Iterator[str]:
    for line in paragraph(title, columns):
        yield f"{BOLD}{line}{RESET}" if colour else line
    if not pieces:
        yield f"{_INDENT}none"
        return
    for row in flow(_painted(pieces, columns - len(_INDENT), colour), columns - len(_INDENT)):
        if colour:
            yield _INDENT + "".join(f"{shades[placed.box.index % 2]}{placed.box.text}{RESET}" for placed in row)
        else:
            yield _INDENT + "".join(placed.box.text for placed in row)


def _painted(pieces: Sequence[str], columns: int, colour: bool) -> Iterator[Box]:
    """The boxes of the tokens. Without colour spaces become visible, and a mark ends the last box of each token."""
    if colour:
        yield from boxes(pieces, columns)
        return
    found = list(boxes(pieces, columns - 1))
    for box, following in zip(found, [*found[1:], None], strict=True):
        mark = _BOUNDARY if following is None or following.first else ""
        yield Box(box.index, box.text.replace(" ", "␣") + mark, box.cells + len(mark), box.first, box.ends_line)


def _dim() -> tuple[str, str]:
    grey = swatches(palette_named("grey"), dark=True)
    return DIM, DIM + paint(grey[STEPS // 4])


def _shades(one: int, another: int) -> tuple[str, str]:
    """Two neighbouring steps of the default palette, on a dark background; see `palette.level`."""
    colours = swatches(palette_named(DEFAULT_PALETTE), dark=True)
    return paint(colours[one]), paint(colours[another])
