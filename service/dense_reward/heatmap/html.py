"""A heatmap as HTML: a document, or a fragment for notebooks. No scripts, external assets or style attributes.

Styles are in style.py. This module writes structure and text; all text is made visible and escaped.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from dense_reward.heatmap.lines import token_lines
from dense_reward.heatmap.palette import level, palette_named
from dense_reward.heatmap.rows import (
    Heatmap,
    HeatmapAlternative,
    HeatmapRow,
    lowest,
    plain,
    summary,
    tick_labels,
    typeset,
)
from dense_reward.heatmap.style import page_stylesheet, style_source, stylesheet
from dense_reward.heatmap.visible import visible, visible_lines

_NO_TOKENS = '<span class="none">no tokens</span>'


def render_html(heatmap: Heatmap, *, fragment: bool = False) -> str:
    """A self-contained document. `fragment`: only a <style> and a <figure>, for another page."""
    if fragment:
        return f"<style>{stylesheet(palette_named(heatmap.palette))}</style>{_figure(heatmap)}\n"
    return render_html_document([heatmap])


def render_html_document(heatmaps: Sequence[Heatmap]) -> str:
    """One document with heatmaps below each other, each on its own scale.

    Raises ValueError if there are none, or if they have several palettes.
    """
    names = {heatmap.palette for heatmap in heatmaps}
    if len(names) != 1:
        raise ValueError(
            f"a document has one palette, not {sorted(names)}; give at least one heatmap, and one palette for all"
        )
    palette = palette_named(names.pop())
    figures = "\n".join(map(_figure, heatmaps))
    policy = escape(f"default-src 'none'; style-src {style_source(palette)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(heatmaps[0].signal)} per token</title>\n<style>{page_stylesheet(palette)}</style>\n"
        f"</head>\n<body>\n{figures}\n</body>\n</html>\n"
    )


def _figure(heatmap: Heatmap) -> str:
    rows = "\n".join(_row(row, heatmap) for row in heatmap.rows)
    return f'<figure class="dr-heatmap dr-{heatmap.palette}">\n{_legend(heatmap)}\n{rows}\n</figure>'


def _legend(heatmap: Heatmap) -> str:
    scale, unit = heatmap.scale, escape(heatmap.unit)
    ticks = (f"<span>{tick}</span>" for tick in tick_labels(scale))
    return (
        f'<figcaption><div class="about"><p class="signal">{_text(heatmap.signal)} per token, {unit}</p>'
        f'<p class="dim">{_text(heatmap.caption)}</p></div>'
        f'<div class="scale"><div class="bar"></div><div class="ticks">{"".join(ticks)}</div>'
        f'<p class="dim note">colour saturates at ±{scale:.3g} {unit}{_shared(heatmap)}; '
        "the lowest token of a row is outlined</p></div></figcaption>"
    )


def _shared(heatmap: Heatmap) -> str:
    return ", the same for all rows" if len(heatmap.rows) > 1 else ""


def _row(row: HeatmapRow, heatmap: Heatmap) -> str:
    prompt = f'<div class="prompt">{_lines(visible_lines(row.prompt))}</div>' if row.prompt else ""
    marked = lowest(row)
    tokens = "".join(_token(row, index, heatmap, marked=index == marked) for index in range(len(row.pieces)))
    return (
        f'<section class="row"><div class="head"><p class="title">{_text(row.title)}</p>{_stats(row)}</div>'
        f'{prompt}<div class="tokens">{tokens or _NO_TOKENS}</div></section>'
    )


def _stats(row: HeatmapRow) -> str:
    numbers, marked = summary(row), lowest(row)
    parts = [f"<span>tokens <b>{len(row.pieces)}</b></span>", f"<span>sum <b>{typeset(numbers.sum)}</b></span>"]
    if numbers.mean is not None and numbers.min is not None and marked is not None:
        token = "".join(map(escape, token_lines(row.pieces[marked])))
        parts += [
            f"<span>mean <b>{typeset(numbers.mean)}</b></span>",
            f'<span>min <b>{typeset(numbers.min)}</b> at <b class="mono">{token}</b> (#{marked})</span>',
        ]
    return f'<div class="stats">{"".join(parts)}</div>'


def _token(row: HeatmapRow, index: int, heatmap: Heatmap, *, marked: bool) -> str:
    piece = row.pieces[index]
    line_feeds = piece.count("\n")
    shown = (
        f'<span class="b">{escape(line)}</span>{"<br>" * (number < line_feeds)}'
        for number, line in enumerate(token_lines(piece))
    )
    classes = f"t c{level(row.values[index], heatmap.scale)}{' low' * marked}"
    return f'<div class="{classes}" tabindex="0">{"".join(shown)}{_tip(row, index, heatmap)}</div>'


def _tip(row: HeatmapRow, index: int, heatmap: Heatmap) -> str:
    value, text = row.values[index], "".join(map(escape, token_lines(row.pieces[index])))
    details = (
        f"<tr>{_entry(name, numbers[index], plain(numbers[index]))}</tr>"
        for name, numbers in row.details.items()
        if name != heatmap.signal
    )
    shown = f'<tr class="shown">{_entry(heatmap.signal, value, typeset(value, 3))}</tr>'
    return (
        f'<div class="tip" role="tooltip"><div class="what"><span class="mono">{text}</span>'
        f'<span class="dim">#{index}, id {row.token_ids[index]}</span></div>'
        f"<table>{shown}{''.join(details)}</table>"
        f"{_alternatives(row.alternatives[index] if row.alternatives else (), heatmap)}</div>"
    )


def _entry(name: str, value: float, printed: str) -> str:
    likelihood = f'<td class="dim">p {_probability(value)}</td>' if name.endswith("logprob") else ""
    return f"<th>{_text(name.replace('_', ' '))}</th><td>{printed}</td>{likelihood}"


def _alternatives(alternatives: Iterable[HeatmapAlternative], heatmap: Heatmap) -> str:
    entries = "".join(
        f'<tr><td class="mono">{_text(one.text)}</td><td>{_probability(one.logprob)}</td>'
        f"<td{_shade(one.reward, heatmap)}>{typeset(one.reward)}</td></tr>"
        for one in alternatives
    )
    heads = "<tr><th>likeliest under sft</th><th>p</th><th>reward</th></tr>"
    return f'<table class="others">{heads}{entries}</table>' if entries else ""


def _shade(reward: float, heatmap: Heatmap) -> str:
    # The scale belongs to the shown signal, so rewards are coloured only if they are that signal.
    return f' class="v{level(reward, heatmap.scale)}"' if heatmap.signal == "reward" else ""


def _probability(logprob: float) -> str:
    share = math.exp(min(logprob, 0.0))  # float32 rounding can leave a log-probability just above 0
    return f"{100 * share:.1f} %" if share >= 0.0005 else f"{share:.0e}"


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(map(escape, lines))


def _text(text: str) -> str:
    return escape(visible(text))
