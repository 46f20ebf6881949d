"""Heatmaps: every token once and in order, no active text, the same colour for the same value."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import get_args
from xml.etree import ElementTree

import pytest
from dense_reward.heatmap import (
    MEANINGS,
    PALETTES,
    Heatmap,
    HeatmapAlternative,
    HeatmapRow,
    build,
    render_ansi,
    render_html,
    render_html_document,
    render_svg,
    shared_scale,
)
from dense_reward.heatmap.visible import cells, visible
from dense_reward.schemas import SignalName
from hypothesis import example, given, settings
from hypothesis import strategies as st

HOSTILE = (
    "\x1b[2J",
    "\x1b]8;;http://x\x07",
    "\u202eevil",
    "\u2066",
    "<script>alert(1)</script>",
    "</style></title><b onclick='x'>",
    "]]>",
    "<!--",
    "&amp;&lt;",
    "\"'`",
    "\x00\x9b1m",
    "\ud800",
    "\ufffe",
    "\n",
    "a\n⏎",
    "\u0301",
    "",
)
VOID = {"br", "meta"}
SVG = "{http://www.w3.org/2000/svg}"
SGR = re.compile(r"\x1b\[[0-9;]*m")

texts = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=()), max_size=12)
nats = st.floats(-50, 50, width=32)


@dataclass
class Page(HTMLParser):
    """What a browser sees: the boxes of the tokens in order, their classes, and all tags and attributes."""

    tokens: list[str] = field(default_factory=list)
    classes: list[list[str]] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    text: str = ""
    _open: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = (dict(attrs).get("class") or "").split()
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in VOID:
            self._open.append((tag, names))
        if "t" in names:
            self.tokens.append("")
            self.classes.append(names)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and "b" in self._open[-1][1]:
            self.tokens[-1] += data

    def close(self) -> None:
        super().close()
        assert self._open == []


@st.composite
def rows(draw: st.DrawFn) -> HeatmapRow:
    pieces = tuple(draw(st.lists(texts, max_size=6)))
    size = len(pieces)
    values = tuple(draw(st.lists(nats, min_size=size, max_size=size)))
    alternatives = tuple((HeatmapAlternative(draw(texts), -0.5, value),) for value in values)
    details = {"reward": values, draw(texts): values}
    return HeatmapRow(draw(texts), draw(texts), pieces, tuple(range(size)), values, details, alternatives)


heatmaps = st.builds(
    build, st.lists(rows(), max_size=3), signal=st.just("reward"), palette=st.sampled_from([*PALETTES])
)


def row(pieces: Sequence[str], values: Sequence[float], title: str = "answer", prompt: str = "") -> HeatmapRow:
    return HeatmapRow(title, prompt, tuple(pieces), tuple(range(len(pieces))), tuple(values), {})


def page(markup: str) -> Page:
    reader = Page()
    reader.feed(markup)
    reader.close()
    return reader


def svg_tokens(picture: str) -> list[ElementTree.Element]:
    return [group for group in ElementTree.fromstring(picture).iter(f"{SVG}g") if group.get("class") == "token"]


def svg_text(group: ElementTree.Element) -> str:
    return "".join(text.text or "" for text in group.iter(f"{SVG}text")).replace("\u00a0", " ")


def shown_piece(piece: str) -> str:
    """The visible text of a token. Each line is separate, so a combining mark at its start gets a dotted circle."""
    return "⏎".join(map(visible, piece.split("\n"))) or "·"


def shown_pieces(heatmap: Heatmap) -> list[str]:
    return [shown_piece(piece) for one in heatmap.rows for piece in one.pieces]


@settings(deadline=None, max_examples=60)
@given(heatmaps)
@example(build([row(HOSTILE, [0.5] * len(HOSTILE), HOSTILE[4], "".join(HOSTILE))], signal="reward"))
def test_html_is_balanced_and_shows_every_token_once_in_order(heatmap: Heatmap) -> None:
    for markup in (render_html(heatmap), render_html(heatmap, fragment=True)):
        assert page(markup).tokens == shown_pieces(heatmap)


@settings(deadline=None, max_examples=60)
@given(heatmaps)
@example(build([row(HOSTILE, [0.5] * len(HOSTILE), HOSTILE[4], "".join(HOSTILE))], signal="reward"))
def test_nothing_of_the_text_becomes_markup(heatmap: Heatmap) -> None:
    calm = build([row(["x", "y\n"], [0.5, -1.0], prompt="p\nq")], signal="reward")
    detailed = HeatmapRow(
        "", "", ("x",), (1,), (0.1,), {"sft_logprob": (-1.0,)}, ((HeatmapAlternative("a", -1.0, 1.0),),)
    )
    known = page(render_html(calm) + render_html(build([detailed], signal="reward")))
    seen = page(render_html(heatmap))
    assert seen.tags <= known.tags
    assert seen.attributes <= known.attributes
    assert not {"style", "href", "src", "id"} & seen.attributes
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]", seen.text)


@settings(deadline=None, max_examples=60)
@given(heatmaps, st.integers(300, 1200), st.booleans())
@example(build([row(HOSTILE, [0.5] * len(HOSTILE), HOSTILE[4], "".join(HOSTILE))], signal="reward"), 900, False)
def test_svg_is_xml_with_every_token_once_in_order_inside_the_picture(heatmap: Heatmap, width: int, dark: bool) -> None:
    picture = render_svg(heatmap, width_px=width, dark=dark)
    tokens = svg_tokens(picture)
    assert [svg_text(token) for token in tokens] == shown_pieces(heatmap)
    assert all(token.find(f"{SVG}title") is not None for token in tokens)
    for token in tokens:
        for box in token.iter(f"{SVG}rect"):
            assert float(box.get("x", "nan")) + float(box.get("width", "nan")) <= width - 40
    picture.encode()


@settings(deadline=None, max_examples=60)
@given(heatmaps, st.integers(20, 120), st.booleans())
@example(build([row(HOSTILE, [0.5] * len(HOSTILE), HOSTILE[4], "".join(HOSTILE))], signal="reward"), 40, True)
def test_a_terminal_gets_the_pictures_own_colours_and_no_other_control(
    heatmap: Heatmap, width: int, dark: bool
) -> None:
    painted = render_ansi(heatmap, columns=width, dark=dark)
    plain = SGR.sub("", painted)
    assert not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", plain
    )
    assert max(cells(line) for line in plain.split("\n")) <= width
    assert all(line.endswith("\x1b[0m") for line in painted.split("\n") if "\x1b" in line)
    joined = plain.replace("\n", "")
    assert all(
        "".join(map(shown_piece, one.pieces)).replace("·" * (not one.pieces), "") in joined for one in heatmap.rows
    )


@settings(deadline=None, max_examples=60)
@given(heatmaps, st.integers(20, 120))
def test_without_colour_no_escape_sequence_is_printed_and_lines_fit(heatmap: Heatmap, width: int) -> None:
    printed = render_ansi(heatmap, columns=width, colour=False)
    assert "\x1b" not in printed
    assert max(cells(line) for line in printed.split("\n")) <= width


def test_without_colour_the_value_stands_below_its_token_and_the_lowest_is_starred() -> None:
    heatmap = build([row(["7", " wrong", "\n", "日本", "!"], [0.25, -3.2, 0.0, 1.0, -0.01])], signal="reward")
    lines = render_ansi(heatmap, colour=False).split("\n")
    assert lines[2:6] == ["7    ␣wrong ⏎", "+0.2 -3.2*  0.0", "日本 !", "+1.0 0.0"]


@settings(deadline=None)
@given(st.lists(nats, min_size=1, max_size=20))
def test_equal_values_have_equal_colours_in_every_row_and_every_picture(values: list[float]) -> None:
    heatmap = build([row(["x"] * len(values), values), row(["y"] * len(values), values[::-1])], signal="reward")
    fills = [next(token.iter(f"{SVG}rect")).get("fill") for token in svg_tokens(render_svg(heatmap))]
    classes = [next(name for name in names if name not in {"low", "t"}) for names in page(render_html(heatmap)).classes]
    backgrounds = re.findall(r"\x1b\[48;2;([0-9;]+);38;[0-9;]+m(?:\x1b\[1;4m)?[xy]", render_ansi(heatmap, columns=200))
    by_value: dict[float, set[tuple[str | None, str, str]]] = {}
    for value, *colours in zip([*values, *values[::-1]], fills, classes, backgrounds, strict=True):
        fill, name, background = colours
        by_value.setdefault(value, set()).add((fill, name, background))
    assert all(len(colours) == 1 for colours in by_value.values())


def test_the_lowest_token_of_each_row_is_outlined() -> None:
    heatmap = build([row("abc", [1, -2, 0]), row("de", [3, 2])], signal="reward")
    marked = ["low" in names for names in page(render_html(heatmap)).classes]
    outlined = ["stroke" in next(token.iter(f"{SVG}rect")).attrib for token in svg_tokens(render_svg(heatmap))]
    assert marked == outlined == [False, True, False, False, True]
    assert re.findall(r"\x1b\[1;4m(.)", render_ansi(heatmap)) == ["b", "e"]


def test_tokens_with_line_feeds_break_the_line_after_the_sign() -> None:
    heatmap = build([row(["a", "\n\n", "b"], [0, 1, 0])], signal="reward")
    assert '<span class="b">⏎</span><br><span class="b">⏎</span><br>' in render_html(heatmap)
    assert [line for line in SGR.sub("", render_ansi(heatmap)).split("\n") if line][2:5] == ["a⏎", "⏎", "b"]
    heights = [box.get("y") for token in svg_tokens(render_svg(heatmap)) for box in token.iter(f"{SVG}rect")]
    assert heights == ["1", "1", "23", "45"]


def test_wide_characters_take_two_cells_when_lines_are_wrapped() -> None:
    heatmap = build([row(["日本語"] * 7, [0.0] * 7)], signal="reward")
    lines = SGR.sub("", render_ansi(heatmap, columns=20)).split("\n")
    assert lines.count("日本語" * 3) == 2
    widths = {box.get("width") for token in svg_tokens(render_svg(heatmap)) for box in token.iter(f"{SVG}rect")}
    assert widths == {f"{6 * 8.4 - 1:.2f}"}


def test_a_token_longer_than_a_line_is_cut_over_lines_and_stays_one_token() -> None:
    heatmap = build([row(["-" * 90], [1.0])], signal="reward")
    (token,) = svg_tokens(render_svg(heatmap, width_px=300))
    assert len(list(token.iter(f"{SVG}rect"))) == 3
    assert svg_text(token) == "-" * 90


def test_a_token_without_text_of_its_own_is_drawn_with_a_marker() -> None:
    heatmap = build([row(["", "é"], [0.5, 0.5])], signal="reward")
    assert page(render_html(heatmap)).tokens == ["·", "é"]
    assert [svg_text(token) for token in svg_tokens(render_svg(heatmap))] == ["·", "é"]
    assert "·" in SGR.sub("", render_ansi(heatmap))


def test_a_response_without_tokens_is_a_row_without_mean_and_minimum() -> None:
    heatmap = build([row([], [])], signal="reward")
    for picture in (page(render_html(heatmap)).text, render_svg(heatmap), render_ansi(heatmap)):
        assert "answer" in picture
        assert "mean" not in picture.split("answer")[1].split("reward per token")[0]


def test_tooltips_tell_position_id_value_details_and_alternatives() -> None:
    alternatives = ((HeatmapAlternative(" 14", -0.105, 1.75), HeatmapAlternative("<b>", -9.0, 0.0)),)
    details = {"sft_logprob": (-4.605,), "kl": (0.125,)}
    one = HeatmapRow("answer", "", (" 15",), (220,), (-4.91,), details, alternatives)
    text = page(render_html(build([one], signal="reward"))).text
    for expected in ("#0, id 220", "−4.910", "sft logprob−4.605p 1.0 %", "kl0.125", " 1490.0 %+1.75", "<b>1e-040.00"):
        assert expected in text
    title = next(svg_tokens(render_svg(build([one], signal="reward")))[0].iter(f"{SVG}title")).text
    assert title == "“ 15” #0, id 220\nreward −4.910\nsft_logprob −4.605\nkl 0.125"


def test_rows_show_their_sum_mean_and_lowest_token() -> None:
    heatmap = build([row(["a", " b"], [1.0, -2.5])], signal="reward")
    assert "sum −1.50mean −0.75min −2.50 at  b (#1)" in page(render_html(heatmap)).text
    assert 'sum -1.50  mean -0.75  min -2.50 at " b" (#1)' in render_ansi(heatmap)


@pytest.mark.parametrize("signal", get_args(SignalName))
def test_legends_state_signal_meaning_and_scale(signal: str) -> None:
    heatmap = Heatmap((row(["a"], [1.0]), row(["b"], [2.0])), signal, "grey", 3.2)
    for picture in (render_html(heatmap), render_svg(heatmap)):
        assert f"{signal} per token, nats" in picture
        assert "saturates at ±3.2 nats, the same for all rows" in picture
        assert "−3.2" in picture
        assert "+1.6" in picture
    assert MEANINGS[signal].split(":")[0] in render_html(heatmap)
    assert re.search(r"−3\.2 +0 +\+3\.2", SGR.sub("", render_ansi(heatmap)))


def test_a_signal_of_another_kind_brings_its_own_meaning_and_unit() -> None:
    with pytest.raises(ValueError, match=r"'value'.*give its meaning"):
        build([row(["a"], [1.0])], signal="value")
    heatmap = build([row(["a"], [1.0])], signal="value", meaning="the reward head's output", unit="points")
    assert "the reward head&#x27;s output" in render_html(heatmap)
    assert "points" in render_svg(heatmap)


@given(st.lists(st.lists(nats, max_size=8), max_size=4))
def test_the_shared_scale_is_positive_symmetric_and_independent_of_the_order_of_rows(values: list[list[float]]) -> None:
    shown = [row(["x"] * len(some), some) for some in values]
    mirrored = [row(["x"] * len(some), [-value for value in some]) for some in values]
    scale = shared_scale(shown)
    assert 0.01 <= scale <= 1.05 * max([1.0, *(abs(value) for some in values for value in some)])
    assert scale == shared_scale(shown[::-1]) == shared_scale(mirrored)


def test_one_outlier_among_many_tokens_does_not_set_the_scale() -> None:
    quiet = row(["x"] * 1000, [0.5, -0.5] * 500)
    assert shared_scale([quiet, row(["y"], [-40.0])]) == 0.5


def test_one_wrong_token_of_a_short_answer_is_within_the_scale() -> None:
    assert shared_scale([row(["x"] * 30, [0.3] * 29 + [-5.0])]) > 3


def test_rounding_noise_is_not_painted_in_full_colours() -> None:
    assert shared_scale([row(["x", "y"], [1e-7, -3e-6])]) == 0.01
    assert shared_scale([row(["x"], [0.0])]) == shared_scale([]) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match=r"row 'answer': values holds .*finite"):
        row(["a"], [bad])
    with pytest.raises(ValueError, match="kl holds"):
        HeatmapRow("answer", "", ("a",), (1,), (0.0,), {"kl": (bad,)})
    with pytest.raises(ValueError, match="alternatives holds"):
        HeatmapRow("answer", "", ("a",), (1,), (0.0,), {}, ((HeatmapAlternative("b", -1.0, bad),),))
    with pytest.raises(ValueError, match="scale"):
        Heatmap((), "reward", "grey", bad)


def test_arrays_of_another_length_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="values has 2 entries for 1 pieces; give one per token"):
        row(["a"], [0.0, 1.0])
    with pytest.raises(ValueError, match="token_ids has 0 entries"):
        HeatmapRow("answer", "", ("a",), (), (0.0,), {})
    with pytest.raises(ValueError, match="kl has 3 entries"):
        HeatmapRow("answer", "", ("a",), (1,), (0.0,), {"kl": (0.0, 0.0, 0.0)})
    with pytest.raises(ValueError, match="alternatives has 0 entries"):
        HeatmapRow("answer", "", ("a",), (1,), (0.0,), {}, ())


def test_heatmaps_on_their_own_scales_share_a_document_and_a_palette() -> None:
    one, other = (build([row([name], [value])], signal="reward") for name, value in (("a", 1.0), ("b", 9.0)))
    markup = render_html_document([one, other])
    assert page(markup).tokens == ["a", "b"]
    assert markup.count("<style>") == 1
    assert "±1 nats" in markup
    assert "±9 nats" in markup
    with pytest.raises(ValueError, match=r"one palette, not \['blue-red', 'grey'\]"):
        render_html_document([one, build(other.rows, signal="reward", palette="grey")])


def test_pictures_too_narrow_to_draw_are_refused() -> None:
    heatmap = build([row(["a"], [1.0])], signal="reward")
    with pytest.raises(ValueError, match="at least 300"):
        render_svg(heatmap, width_px=299)
    with pytest.raises(ValueError, match="at least 20"):
        render_ansi(heatmap, columns=19)


@pytest.mark.parametrize("name", PALETTES)
def test_a_document_styles_itself_under_a_policy_that_names_its_stylesheet_alone(name: str) -> None:
    markup = render_html(build([row(["a"], [1.0])], signal="reward", palette=name))
    (style,) = re.findall(r"<style>(.*?)</style>", markup, re.DOTALL)
    source = f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
    assert f"default-src &#x27;none&#x27;; style-src {source.replace(chr(39), '&#x27;')}" in markup
    assert "url(" not in style
    assert "@import" not in style
