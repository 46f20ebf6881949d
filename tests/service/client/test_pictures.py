"""Heatmaps of answers: in notebooks, and as figures for papers. They are drawn from the answer alone."""

import re
import struct
import sys
from collections.abc import Sequence

import dense_reward.heatmap
import numpy as np
import pytest
from dense_reward import Scored, ScoredItem, ScoredResponse, ServedModel, Timing, Usage
from dense_reward.client.errors import ItemError
from dense_reward.client.pictures import SHOWN_TOKENS, FileFormat, TextFormat
from dense_reward.records import FloatArray

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\u202eevil",
    "\x1b[2J",
    "$x^{2",
    "$",
    "&amp;",
)
PAIR = ServedModel("base", "sft", "base", "0" * 64, "1" * 64, related=True)
HEAD = ServedModel("head", None, None, "0" * 64, "1" * 64, related=True, token_head="head")


def answered(
    pieces: Sequence[str], response: int = 0, *, item: int = 0, names: tuple[str, ...] | None = None
) -> ScoredResponse:
    """A response with the texts of its tokens, and a reward and a log-prob for each."""
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int32)
    rewards: FloatArray = np.linspace(-1, 1, len(pieces), dtype=np.float32)
    return ScoredResponse(
        item,
        response,
        len(pieces),
        float(rewards.sum()),
        tokens=tuple(pieces) if names is None else names,
        offsets=np.stack([ends - [len(piece) for piece in pieces], ends], axis=1).astype(np.int32),
        text="".join(pieces),
        token_ids=np.arange(len(pieces), dtype=np.int32),
        reward=rewards,
        sft_logprob=-np.abs(rewards),
    )


def scored(*responses: ScoredResponse, model: ServedModel = PAIR) -> Scored:
    return Scored("id", model, responses, Usage(1, 1, 1), Timing(0, 0, 0, 0, 0))


def size_px(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def notebook(result: Scored | ScoredItem) -> str:
    html = result._repr_html_()
    assert html is not None
    return html


def test_a_notebook_shows_every_token_escaped_and_runs_nothing() -> None:
    html = notebook(scored(answered(HOSTILE), answered(["7", "+"], 1)))
    assert html.startswith("<style>")
    assert "body{" not in html, "the page around it keeps its style"
    assert not re.search(
        r"<(script|img|link|iframe)|https?://|url\(|\son\w+=(?!alert)", html.replace("&lt;", "").replace("&gt;", "")
    )
    assert "&lt;script&gt;" in html
    assert "prefers-color-scheme:dark" in html
    assert "response 2" in html


def test_a_document_is_shown_in_a_notebook_without_its_head_and_a_file_holds_all_of_it() -> None:
    document = scored(answered(["7", "+"])).heatmap()
    assert document.startswith("<!DOCTYPE html>")
    shown = document._repr_html_()  # type: ignore[attr-defined] # what a notebook looks for
    assert shown.startswith("<style>")
    assert "<!DOCTYPE" not in shown


@pytest.mark.parametrize("format", ["html", "svg", "png"])
def test_a_notebook_keeps_the_picture_once(format: TextFormat) -> None:
    pytest.importorskip("matplotlib")
    picture = scored(answered(["7", "+"])).heatmap(format=format)
    assert re.fullmatch(rf"<heatmap, {format}, \d+ (characters|bytes)>", repr(picture))
    assert callable(getattr(picture, {"html": "_repr_html_", "svg": "_repr_svg_", "png": "_repr_png_"}[format]))


def test_a_long_answer_does_not_fill_the_notebook() -> None:
    half = answered(["x"] * (SHOWN_TOKENS // 2))
    html = notebook(scored(half, half, half))
    assert html.count("<section") == 2
    assert "1 more responses are not shown" in html
    assert notebook(scored(answered(["x"] * (SHOWN_TOKENS + 1)))).count("<section") == 1


def test_a_signal_that_was_not_requested_is_refused_and_a_notebook_takes_another() -> None:
    with pytest.raises(ValueError, match="answered without kl: request it with include"):
        scored(answered(["7"])).heatmap(signal="kl")
    only_ids = ScoredResponse(
        0, 0, 2, -3.0, token_ids=np.array([5, 6], np.int32), sft_logprob=np.array([-1, -2], np.float32)
    )
    html = notebook(scored(only_ids))
    assert "sft_logprob per token" in html
    assert ">5 <" in html, "without texts, tokens are shown by their ids"
    assert scored(ScoredResponse(0, 0, 2, 0.0))._repr_html_() is None


def test_special_tokens_are_shown_by_name_and_parts_of_characters_are_not() -> None:
    html = notebook(scored(answered(["", "", "é"], names=("<|im_end|>", "\ufffd", "\ufffd"))))
    assert "&lt;|im_end|&gt;" in html
    assert "\ufffd" not in html
    assert "·" in html


def test_failed_items_are_named() -> None:
    failed = ScoredResponse(1, None, 0, float("nan"), error=ItemError(code="too_long", message="9 tokens are too many"))
    html = notebook(scored(answered(["7"]), failed))
    assert "item 2 failed: 9 tokens are too many" in html
    item = ScoredItem(0, PAIR, (answered(["7"]),))
    assert "response" in notebook(item)
    assert ScoredItem(0, None, (), failed.error)._repr_html_() is None


def test_rewards_of_a_token_head_have_its_meaning_and_unit() -> None:
    assert "log-odds" in scored(answered(["7"]), model=HEAD).heatmap(format="svg")
    assert "log-odds" not in scored(answered(["7"]), model=HEAD).heatmap(format="svg", signal="sft_logprob")


@pytest.mark.parametrize("format", ["png", "pdf"])
def test_equal_results_give_equal_pictures_whatever_the_settings_of_matplotlib(format: FileFormat) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    first = scored(answered(HOSTILE)).heatmap(format=format)
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "text.color": "red"}):
        assert scored(answered(HOSTILE)).heatmap(format=format) == first


def test_a_picture_has_the_width_that_was_asked_for_and_wraps_its_tokens() -> None:
    pytest.importorskip("matplotlib")
    result = scored(answered(["word "] * 60))
    wide, narrow = (size_px(result.heatmap(format="png", width_in=width)) for width in (6.5, 3.25))
    assert (wide[0], narrow[0]) == (1300, 650)
    assert narrow[1] > wide[1]
    with pytest.raises(ValueError, match="too small"):
        result.heatmap(format="png", width_in=1)


def test_a_pdf_holds_text_in_embedded_fonts_and_no_image() -> None:
    pytest.importorskip("matplotlib")
    pdf = scored(answered(["7", "+", "8"])).heatmap(format="pdf")
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf, "TrueType"
    assert b"/Subtype /Image" not in pdf
    assert b"CreationDate" not in pdf


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dense_reward.heatmap.figure", raising=False)
    monkeypatch.delattr(dense_reward.heatmap, "figure", raising=False)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        scored(answered(["7"])).heatmap(format="png")


@pytest.mark.parametrize(("format", "begins"), [("html", "<!DOCTYPE"), ("svg", "<svg"), ("ansi", "\x1b[")])
def test_texts_need_no_matplotlib(format: TextFormat, begins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert scored(answered(["7", "+"])).heatmap(format=format, palette="grey").startswith(begins)


def test_an_unknown_format_or_palette_is_refused() -> None:
    with pytest.raises(ValueError, match="choose html, svg, ansi, png or pdf"):
        scored(answered(["7"])).heatmap(format="gif")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="no palette is called"):
        scored(answered(["7"])).heatmap(palette="rainbow")
