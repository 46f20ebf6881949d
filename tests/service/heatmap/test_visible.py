"""Visible text: no character that is invisible or active is left."""

import unicodedata
from xml.etree import ElementTree

import pytest
from dense_reward.heatmap.visible import cells, visible, visible_lines
from hypothesis import example, given
from hypothesis import strategies as st

any_text = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ß, 日本", "plain text, ß, 日本"),
        ("a\nb", "a⏎b"),
        ("\tx", "⇥x"),
        ("\r\n", "\\u{D}⏎"),
        ("\x1b[2J", "\\u{1B}[2J"),
        ("\x00\x7f\x85", "\\u{0}\\u{7F}\\u{85}"),
        ("\u202eevil\u2066", "\\u{202E}evil\\u{2066}"),
        ("a\u200bb\ufeff", "a\\u{200B}b\\u{FEFF}"),
        ("\u2028", "\\u{2028}"),
        ("one\u00a0word", "one⍽word"),
        ("\u3164\ufe0f\U000e0101", "\\u{3164}\\u{FE0F}\\u{E0101}"),
        ("\ud800", "\\u{D800}"),
        ("\ufffe", "\\u{FFFE}"),
        ("e\u0301", "e\u0301"),
        ("\u0301x", "◌\u0301x"),
        ("", ""),
    ],
)
def test_each_kind_of_hidden_character_has_its_sign(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(any_text)
@example("\x1b]0;title\x07\u202e\ud800")
def test_nothing_invisible_is_left(text: str) -> None:
    left = {unicodedata.category(character)[0] for character in visible(text) if character not in " \u3000"}
    assert not left & {"C", "Z"}


@given(any_text)
def test_what_comes_out_can_stand_in_xml_and_in_utf8(text: str) -> None:
    element = ElementTree.Element("text")
    element.text = visible(text)
    assert ElementTree.fromstring(ElementTree.tostring(element, encoding="utf-8")).text in (visible(text), None)


@given(any_text)
def test_showing_twice_shows_the_same(text: str) -> None:
    assert visible(visible(text)) == visible(text)


@given(any_text)
def test_lines_end_where_line_feeds_are(text: str) -> None:
    lines = visible_lines(text)
    assert len(lines) == text.count("\n") + 1
    assert all(line.endswith("⏎") for line in lines[:-1])


@given(st.text(st.characters(codec="ascii")))
def test_lines_joined_are_the_whole(text: str) -> None:
    assert "".join(visible_lines(text)) == visible(text)


@pytest.mark.parametrize(("text", "width"), [("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("ｆ", 2), ("🙂", 2)])
def test_cells_count_wide_characters_twice_and_marks_not_at_all(text: str, width: int) -> None:
    assert cells(text) == width
