"""Offsets mapping: every token gets a span of the text, and the spans cover it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from dense_reward.text.offsets import Span, decoded_spans, monotone_spans
from hypothesis import given
from hypothesis import strategies as st
from offset_rules import assert_covering
from tiny_tokenizers import TEXTS

SPLIT_SNOWMAN = [b"\xe2", b"\x98", b"\x83"]


def byte_decoder(tokens: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
    """A tokenizer whose id i stands for tokens[i], decoded as byte-level tokenizers decode."""
    return lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace")


def spans_of(*tokens: bytes) -> tuple[str, tuple[Span, ...]]:
    return decoded_spans(range(len(tokens)), byte_decoder(tokens))


@pytest.mark.parametrize(
    ("offsets", "length", "spans"),
    [
        ([(0, 2), (2, 5)], 5, [(0, 2), (2, 5)]),
        ([(0, 1), (0, 1), (0, 1)], 1, [(0, 0), (0, 0), (0, 1)]),  # a character split over three tokens
        ([(0, 2), (1, 2), (1, 3)], 3, [(0, 1), (1, 1), (1, 3)]),  # a character whose neighbours share its tokens
        ([(0, 1), (2, 3), (5, 6)], 8, [(0, 1), (1, 3), (3, 8)]),  # spaces that the tokenizer skipped
        ([(0, 0), (0, 1)], 1, [(0, 0), (0, 1)]),  # a token without any text
        ([(0, 9)], 3, [(0, 3)]),
        ([], 0, []),
    ],
)
def test_offsets_of_a_tokenizer_become_spans_without_gaps_or_overlap(
    offsets: list[Span], length: int, spans: list[Span]
) -> None:
    assert list(monotone_spans(offsets, length)) == spans


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))), st.integers(0, 20))
def test_spans_cover_the_text_whatever_a_tokenizer_says(offsets: list[Span], length: int) -> None:
    spans = monotone_spans(offsets, length)
    assert len(spans) == len(offsets)
    assert_covering(spans, length)


@pytest.mark.parametrize(
    ("tokens", "text", "spans"),
    [
        ([b"a", b"bc"], "abc", [(0, 1), (1, 3)]),
        (SPLIT_SNOWMAN, "☃", [(0, 0), (0, 0), (0, 1)]),
        ([b"a\xe2", b"\x98\x83b"], "a☃b", [(0, 1), (1, 3)]),
        ([*SPLIT_SNOWMAN, *SPLIT_SNOWMAN], "☃☃", [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2)]),
        (["👩".encode(), "\u200d".encode(), "🔬".encode()], "👩‍🔬", [(0, 1), (1, 2), (2, 3)]),
        ([b"e", "\u0301".encode()], "e\u0301", [(0, 1), (1, 2)]),
        ([b"\xff", b"a"], "\ufffda", [(0, 1), (1, 2)]),
        ([b"\xff", b"\xff"], "\ufffd\ufffd", [(0, 1), (1, 2)]),
        (
            [b"a", b"\xe2", b"\x98"],
            "a\ufffd",
            [(0, 1), (1, 1), (1, 2)],
        ),  # bytes that never become a character belong to their last token
        ([b"\xe2", b"\x98", b"a"], "\ufffda", [(0, 0), (0, 1), (1, 2)]),
        ([b"\xf0\x9f", b"\xff", b"\x98"], "\ufffd" * 3, [(0, 1), (1, 2), (2, 3)]),
        (["\ufffd".encode(), b"a"], "\ufffda", [(0, 1), (1, 2)]),  # the replacement character itself
        ([b"\xef", b"\xbf", b"\xbd", *SPLIT_SNOWMAN], "\ufffd☃", [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2)]),
        ([b"", b"a", b""], "a", [(0, 0), (0, 1), (1, 1)]),
        ([b"\xe2"], "\ufffd", [(0, 1)]),
        ([], "", []),
    ],
)
def test_a_token_ends_where_the_last_character_ends_that_it_completes(
    tokens: list[bytes], text: str, spans: list[Span]
) -> None:
    assert spans_of(*tokens) == (text, tuple(spans))


@given(TEXTS.filter(lambda text: "\ufffd" not in text), st.data())
def test_a_character_belongs_to_its_last_token_however_its_bytes_are_cut(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    bounds = [0, *cuts, len(whole)]
    ends = [len(whole[:end].decode(errors="ignore")) for end in bounds[1:]]
    tokens = [whole[start:end] for start, end in pairwise(bounds)]
    assert spans_of(*tokens) == (text, tuple(pairwise([0, *ends])))


@given(st.lists(st.binary(max_size=3), max_size=12))
def test_spans_cover_what_is_no_utf8(tokens: list[bytes]) -> None:
    text, spans = spans_of(*tokens)
    assert text == b"".join(tokens).decode(errors="replace")
    assert len(spans) == len(tokens)
    assert_covering(spans, len(text))


def test_a_decoder_that_strips_the_first_space_of_a_text_loses_no_other() -> None:
    words = ["▁Hello", "▁", "▁world", "▁"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert decoded_spans(range(4), decode) == ("Hello  world ", ((0, 5), (5, 6), (6, 12), (12, 13)))


def test_a_run_of_bytes_that_is_broken_at_its_end_costs_work_in_proportion_to_its_length() -> None:
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        """Like byte fallback: one wrong byte turns every byte of its run into a replacement character."""
        nonlocal decoded
        decoded += len(ids)
        return "\ufffd" * len(ids) if 1 in ids else "\n" * len(ids)

    ids = [0] * 2_000 + [1]
    text, spans = decoded_spans(ids, decode)
    assert text == "\ufffd" * 2_001
    assert_covering(spans, len(text))
    assert decoded < 200 * len(ids)
