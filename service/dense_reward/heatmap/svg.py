"""A heatmap as SVG for papers and READMEs: plain attributes without styles or scripts, which every converter reads.

Widths are estimates for monospace fonts; `textLength` makes the text fit them. Text is made visible and escaped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from dense_reward.heatmap.lines import Box, Line, boxes, flow, paragraph, token_lines
from dense_reward.heatmap.palette import Colour, Palette, Swatch, level, palette_named, swatches
from dense_reward.heatmap.rows import Heatmap, HeatmapRow, lowest, plain, summary, tick_labels, typeset
from dense_reward.heatmap.visible import cells, visible

SMALLEST_WIDTH_PX = 300

_MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
_SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_MARGIN = 20
_CELL = 8.4  # advance of a 14 px monospace font: 0.6 em in nearly all fonts
_LINE = 22  # height of a line of tokens
_SANS_CELL = 6.6  # average advance of a 12.5 px sans-serif font, on the wide side
_BAR = 280


@dataclass(frozen=True, slots=True)
class _Theme:
    page: str
    text: str
    dim: str
    line: str


@dataclass(frozen=True, slots=True)
class _Canvas:
    """What every part of the picture needs: its width in pixels and its colours."""

    width: int
    palette: Palette
    theme: _Theme
    dark: bool

    @property
    def columns(self) -> int:
        return int((self.width - 2 * _MARGIN) / _CELL)

    @property
    def colours(self) -> tuple[Swatch, ...]:
        return swatches(self.palette, dark=self.dark)

    @property
    def stops(self) -> tuple[Colour, ...]:
        return self.palette.dark if self.dark else self.palette.light


@dataclass(frozen=True, slots=True)
class _Part:
    """Markup that is drawn downwards from y = 0, and its height in pixels."""

    markup: str
    height: int


_LIGHT = _Theme(page="#ffffff", text="#1b1f24", dim="#5b6470", line="#dfe3e8")
_DARK = _Theme(page="#15181d", text="#e8ebef", dim="#9aa4b1", line="#343a43")


def render_svg(heatmap: Heatmap, *, width_px: int = 900, dark: bool = False) -> str:
    """A picture of this width, as high as its tokens need, on a white background (dark if `dark`).

    Raises ValueError for a width below 300 pixels.
    """
    if width_px < SMALLEST_WIDTH_PX:
        raise ValueError(f"a width of {width_px} px is too small; give at least {SMALLEST_WIDTH_PX}")
    canvas = _Canvas(width_px, palette_named(heatmap.palette), _DARK if dark else _LIGHT, dark)
    parts = [part for row in heatmap.rows for part in (*_row(row, heatmap, canvas), _gap(14))]
    stacked, height = _stack([_gap(_MARGIN - 4), *parts, _legend(heatmap, canvas), _gap(_MARGIN - 4)])
    label = escape(visible(f"{heatmap.signal} per token, {heatmap.unit}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="{height}" '
        f'viewBox="0 0 {width_px} {height}" role="img" aria-label="{label}">'
        f'<rect width="{width_px}" height="{height}" rx="6" fill="{canvas.theme.page}"/>{stacked}</svg>\n'
    )


def _stack(parts: Sequence[_Part]) -> tuple[str, int]:
    markup, y = [], 0
    for part in parts:
        if part.markup:
            markup.append(f'<g transform="translate({_MARGIN} {y})">{part.markup}</g>')
        y += part.height
    return "".join(markup), y


def _gap(height: int) -> _Part:
    return _Part("", height)


def _row(row: HeatmapRow, heatmap: Heatmap, canvas: _Canvas) -> Iterator[_Part]:
    if row.title:
        yield _prose(row.title, canvas, fill=canvas.theme.text, bold=True)
    yield _prose(_stats(row), canvas, fill=canvas.theme.dim)
    yield _gap(5)
    if row.prompt:
        yield _prompt(row.prompt, canvas)
        yield _gap(5)
    yield _tokens(row, heatmap, canvas)


def _stats(row: HeatmapRow) -> str:
    numbers, marked = summary(row), lowest(row)
    text = f"{len(row.pieces)} tokens · sum {typeset(numbers.sum)}"
    if numbers.mean is None or numbers.min is None or marked is None:
        return text
    token = "".join(token_lines(row.pieces[marked]))
    return f"{text} · mean {typeset(numbers.mean)} · min {typeset(numbers.min)} at “{token}” (#{marked})"


def _prose(text: str, canvas: _Canvas, *, fill: str, bold: bool = False) -> _Part:
    columns = int((canvas.width - 2 * _MARGIN) / (_SANS_CELL * (1.12 if bold else 1)))
    weight = ' font-weight="600" font-size="14"' if bold else ' font-size="12.5"'
    lines = paragraph(text, columns)
    texts = (f'<text y="{14 + 18 * at}">{escape(line)}</text>' for at, line in enumerate(lines))
    return _Part(f'<g font-family="{_SANS}" fill="{fill}"{weight}>{"".join(texts)}</g>', 18 * len(lines))


def _prompt(prompt: str, canvas: _Canvas) -> _Part:
    lines = paragraph(prompt, canvas.columns - 2)
    texts = "".join(_mono(line, x=2 * _CELL, y=14 + 19 * at) for at, line in enumerate(lines))
    height = 19 * len(lines)
    rule = f'<rect x="0" y="1" width="3" height="{height}" fill="{canvas.theme.line}"/>'
    return _Part(f'<g font-family="{_MONO}" font-size="14" fill="{canvas.theme.dim}">{rule}{texts}</g>', height + 2)


def _tokens(row: HeatmapRow, heatmap: Heatmap, canvas: _Canvas) -> _Part:
    if not row.pieces:
        return _prose("no tokens", canvas, fill=canvas.theme.dim)
    lines = flow(boxes(row.pieces, canvas.columns), canvas.columns)
    placed = sorted(_positions(lines), key=lambda entry: entry[0].index)
    marked = lowest(row)
    groups = (
        _token(row, index, list(parts), heatmap, canvas, marked=index == marked)
        for index, parts in groupby(placed, key=lambda entry: entry[0].index)
    )
    markup = f'<g font-family="{_MONO}" font-size="14">{"".join(groups)}</g>'
    return _Part(markup, _LINE * len(lines) + 4)


def _positions(lines: Sequence[Line]) -> Iterator[tuple[Box, float, int]]:
    for at, line in enumerate(lines):
        for placed in line:
            yield placed.box, placed.column * _CELL, at * _LINE


def _token(
    row: HeatmapRow,
    index: int,
    parts: Sequence[tuple[Box, float, int]],
    heatmap: Heatmap,
    canvas: _Canvas,
    *,
    marked: bool,
) -> str:
    colour = canvas.colours[level(row.values[index], heatmap.scale)]
    outline = f' stroke="{canvas.theme.text}" stroke-width="2"' if marked else ""
    shapes = "".join(
        f'<rect x="{x + 0.5:.2f}" y="{y + 1}" width="{box.cells * _CELL - 1:.2f}" height="{_LINE - 2}" rx="3" '
        f'fill="{colour.fill.hex}"{outline}/>{_mono(box.text, x=x, y=y + 16, fill=colour.ink)}'
        for box, x, y in parts
    )
    return f'<g class="token"><title>{escape(_title(row, index, heatmap))}</title>{shapes}</g>'


def _title(row: HeatmapRow, index: int, heatmap: Heatmap) -> str:
    token = "".join(token_lines(row.pieces[index]))
    shown = f"{visible(heatmap.signal)} {typeset(row.values[index], 3)}"
    details = (
        f"{visible(name)} {plain(numbers[index])}" for name, numbers in row.details.items() if name != heatmap.signal
    )
    return "\n".join([f"“{token}” #{index}, id {row.token_ids[index]}", shown, *details])


def _mono(text: str, *, x: float, y: float, fill: Colour | None = None) -> str:
    # `textLength` stretches a font with a different advance to its box.
    width = f' textLength="{cells(text) * _CELL:.2f}" lengthAdjust="spacingAndGlyphs"'
    ink = f' fill="{fill.hex}"' if fill else ""
    # Converters disagree on xml:space and on white-space; all of them keep no-break spaces.
    shown = escape(text.replace(" ", "\u00a0"))
    return f'<text x="{x:.2f}" y="{y}"{width}{ink}>{shown}</text>'


def _legend(heatmap: Heatmap, canvas: _Canvas) -> _Part:
    unit = heatmap.unit
    same = ", the same for all rows" if len(heatmap.rows) > 1 else ""
    note = f"Colour saturates at ±{heatmap.scale:.3g} {unit}{same}; the lowest token of a row is outlined."
    headline = f"{heatmap.signal} per token, {unit}"
    rule = f'<rect width="{canvas.width - 2 * _MARGIN}" height="1" fill="{canvas.theme.line}"/>'
    parts = [_Part(rule, 8), _prose(headline, canvas, fill=canvas.theme.text, bold=True)]
    parts += [_prose(text, canvas, fill=canvas.theme.dim) for text in (heatmap.caption, note)]
    inner, height = [], 0
    for part in [*parts, _gap(8), _bar(heatmap, canvas)]:
        inner.append(f'<g transform="translate(0 {height})">{part.markup}</g>')
        height += part.height
    return _Part("".join(inner), height)


def _bar(heatmap: Heatmap, canvas: _Canvas) -> _Part:
    # The id depends only on the gradient, so several pictures on one page can have the same one.
    name = f"dense-reward-{canvas.palette.name}-{'dark' if canvas.dark else 'light'}"
    last = len(canvas.stops) - 1
    stops = "".join(f'<stop offset="{at / last:.4f}" stop-color="{one.hex}"/>' for at, one in enumerate(canvas.stops))
    labels = "".join(
        f'<text x="{_BAR * at / 4:.0f}" y="26" text-anchor="{"start" if at == 0 else "end" if at == 4 else "middle"}">'
        f"{label}</text>"
        for at, label in enumerate(tick_labels(heatmap.scale))
    )
    return _Part(
        f'<defs><linearGradient id="{name}">{stops}</linearGradient></defs>'
        f'<rect width="{_BAR}" height="12" rx="3" fill="url(#{name})" stroke="{canvas.theme.line}"/>'
        f'<g font-family="{_SANS}" font-size="11.5" fill="{canvas.theme.dim}">{labels}</g>',
        30,
    )
