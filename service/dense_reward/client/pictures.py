"""Heatmaps of results, for notebooks and papers. The service is not asked again: an answer holds what they show.

Draws with `dense_reward.heatmap`. Imports matplotlib only for PNG and PDF.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from dense_reward.client.scored_response import ScoredResponse
from dense_reward.heatmap import (
    DEFAULT_PALETTE,
    HEAD_MEANING,
    HEAD_UNIT,
    Heatmap,
    HeatmapAlternative,
    HeatmapRow,
    build,
    render_ansi,
    render_html,
    render_svg,
)
from dense_reward.records import FloatArray

FloatArrayName = Literal[
    "reward", "sft_logprob", "reference_logprob", "kl", "centred", "entropy", "varentropy", "return_to_go"
]
TextFormat = Literal["html", "svg", "ansi"]
FileFormat = Literal["png", "pdf"]
SIGNALS: tuple[FloatArrayName, ...] = (
    *("reward", "centred", "sft_logprob", "reference_logprob"),
    *("kl", "entropy", "varentropy", "return_to_go"),
)
WIDTH_IN = 6.5
CSS_PX_PER_IN = 96
SHOWN_TOKENS = 4000
"""A notebook shows the first responses with so many tokens: each takes half a kilobyte of its file."""


# Notebooks keep the repr of what they display: it must not repeat the picture.
class Html(str):
    """A whole HTML document. In a notebook it is displayed, without changing the page around it."""

    fragment: str

    def __repr__(self) -> str:
        return f"<heatmap, html, {len(self)} characters>"

    def _repr_html_(self) -> str:
        return self.fragment


class Svg(str):
    """An SVG picture, which a notebook displays."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<heatmap, svg, {len(self)} characters>"

    def _repr_svg_(self) -> str:
        return str(self)


class Png(bytes):
    """The bytes of a PNG, which a notebook displays."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<heatmap, png, {len(self)} bytes>"

    def _repr_png_(self) -> bytes:
        return bytes(self)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The responses of a heatmap. `of_head`: their rewards are the values of a token head."""

    responses: Sequence[ScoredResponse]
    of_head: bool = False


class Pictured:
    """The heatmaps of a result: `heatmap`, and what a notebook displays."""

    __slots__ = ()

    def _drawn(self) -> Drawn:
        raise NotImplementedError

    @overload
    def heatmap(
        self,
        *,
        signal: FloatArrayName = "reward",
        format: TextFormat = "html",
        palette: str = DEFAULT_PALETTE,
        width_in: float = WIDTH_IN,
    ) -> str: ...

    @overload
    def heatmap(
        self,
        *,
        signal: FloatArrayName = "reward",
        format: FileFormat,
        palette: str = DEFAULT_PALETTE,
        width_in: float = WIDTH_IN,
    ) -> bytes: ...

    def heatmap(
        self,
        *,
        signal: FloatArrayName = "reward",
        format: TextFormat | FileFormat = "html",
        palette: str = DEFAULT_PALETTE,
        width_in: float = WIDTH_IN,
    ) -> str | bytes:
        """A heatmap of all responses on one colour scale, which a notebook displays, and a file can hold.

        `html`: a document without scripts, with a card of all signals for each token. `svg`, `pdf` and `png` are
        figures for papers: text stays text in SVG and PDF, and equal results give equal pictures. png and pdf need
        matplotlib. `width_in`: the width of these three in inches; tokens wrap, and text keeps its size.

        Tokens have their text if the answer has it; after a request by ids, ask for it with
        `include=["reward", "tokens", "offsets", "text"]`. Otherwise their ids are shown.

        Raises ValueError if a response was answered without the signal, ImportError if matplotlib is missing.
        """
        drawn = self._drawn()
        heatmap = _heatmap(drawn.responses, signal, palette, of_head=drawn.of_head)
        match format:
            case "html":
                document = Html(render_html(heatmap))
                document.fragment = render_html(heatmap, fragment=True)
                return document
            case "svg":
                return Svg(render_svg(heatmap, width_px=round(CSS_PX_PER_IN * width_in)))
            case "ansi":
                return render_ansi(heatmap)
            case "png" | "pdf":
                return _file(heatmap, format, width_in)
        raise ValueError(f"format {format!r}: choose html, svg, ansi, png or pdf")

    def _repr_html_(self) -> str | None:
        """The heatmap of the first signal that all responses have; None, so the plain text, if there is none."""
        drawn = self._drawn()
        shown = list(_first(drawn.responses))
        good = [one for one in shown if one.error is None]
        signal = next((name for name in SIGNALS if all(getattr(one, name) is not None for one in good)), None)
        if signal is None or not good:
            return None
        heatmap = _heatmap(shown, signal, DEFAULT_PALETTE, of_head=drawn.of_head)
        left = len(drawn.responses) - len(shown)
        more = f"<p>{left} more responses are not shown: heatmap() draws all.</p>\n" if left else ""
        return render_html(heatmap, fragment=True) + more


def _first(responses: Sequence[ScoredResponse]) -> Iterable[ScoredResponse]:
    """The first responses, with at most SHOWN_TOKENS tokens; at least one."""
    tokens = 0
    for number, response in enumerate(responses):
        tokens += response.length
        if number and tokens > SHOWN_TOKENS:
            return
        yield response


def _heatmap(responses: Sequence[ScoredResponse], signal: FloatArrayName, palette: str, *, of_head: bool) -> Heatmap:
    several = len({one.item for one in responses}) > 1
    rows = [_row(one, signal, several_items=several, alone=len(responses) == 1) for one in responses]
    if of_head and signal == "reward":
        return build(rows, signal=signal, palette=palette, meaning=HEAD_MEANING, unit=HEAD_UNIT)
    return build(rows, signal=signal, palette=palette, unit="nats²" if signal == "varentropy" else "nats")


def _row(result: ScoredResponse, signal: FloatArrayName, *, several_items: bool, alone: bool) -> HeatmapRow:
    title = _title(result, several_items=several_items, alone=alone)
    if result.error is not None:
        return HeatmapRow(f"{title} failed: {result.error.message}", "", (), (), (), {})
    arrays: dict[str, tuple[float, ...]] = {
        name: tuple(array.tolist()) for name in SIGNALS if (array := _array(result, name)) is not None
    }
    if signal not in arrays:
        raise ValueError(f"item {result.item} was answered without {signal}: request it with include")
    ids = result.token_ids
    return HeatmapRow(
        title=title,
        prompt="",
        pieces=_pieces(result),
        token_ids=tuple(range(result.length)) if ids is None else tuple(ids.tolist()),
        values=arrays[signal],
        details=arrays,
        alternatives=_alternatives(result),
    )


def _title(result: ScoredResponse, *, several_items: bool, alone: bool) -> str:
    """People count from 1."""
    parts = [f"item {result.item + 1}"] if several_items or result.response is None else []
    parts += [] if result.response is None else ["response" if alone else f"response {result.response + 1}"]
    return ", ".join(parts)


def _array(result: ScoredResponse, name: str) -> FloatArray | None:
    array: FloatArray | None = getattr(result, name)
    return array


def _pieces(result: ScoredResponse) -> tuple[str, ...]:
    """The text of each token, as far as the answer has it: slices of the text, names of tokens, ids, or positions."""
    if result.text is not None and result.offsets is not None:
        names = result.tokens or ("",) * result.length
        spans = result.offsets.tolist()
        return tuple(_piece(result.text[start:end], name) for (start, end), name in zip(spans, names, strict=True))
    if result.tokens is not None:
        return result.tokens
    ids = range(result.length) if result.token_ids is None else result.token_ids.tolist()
    return tuple(f"{one} " for one in ids)


def _piece(text: str, name: str) -> str:
    """A token without text is a special token, whose name is shown, or a part of a character that ends later."""
    return text if text or "\N{REPLACEMENT CHARACTER}" in name else name


def _alternatives(result: ScoredResponse) -> tuple[tuple[HeatmapAlternative, ...], ...] | None:
    if result.alternatives is None:
        return None
    return tuple(
        tuple(HeatmapAlternative(one.token, one.sft_logprob, one.reward) for one in token)
        for token in result.alternatives
    )


def _file(heatmap: Heatmap, format: FileFormat, width_in: float) -> bytes:
    try:
        from dense_reward.heatmap import figure  # noqa: PLC0415 - only these formats need matplotlib
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            f"a heatmap as {format} needs matplotlib: pip install matplotlib (html and svg do without)", name=error.name
        ) from None
    content = figure.render_file(heatmap, format, width_in=width_in)
    return Png(content) if format == "png" else content
