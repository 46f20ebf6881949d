"""Which stretch of a text each token stands for: code-point spans without gaps or overlap that cover the text.

A character split over tokens belongs to its last token. Pure; knows no tokenizer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile

Span = tuple[int, int]
_REPLACEMENT = "\ufffd"  # how bytes decode that are no character, or not yet
_LONGEST_CHARACTER_BYTES = 4
_LONGEST_WINDOW_TOKENS = 64  # bounds the work on bytes that never become the text that they should


def monotone_spans(offsets: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Spans that cover [0, length) from those that a tokenizer gives, which may overlap or leave gaps.

    A boundary lies where a token ends, or earlier where the next one starts inside the same character; skipped text
    goes to the token that follows it.
    """
    spans: list[Span] = []
    start = 0
    for index, (_, end) in enumerate(offsets):
        last = index == len(offsets) - 1
        boundary = length if last else max(start, min(end, offsets[index + 1][0], length))
        spans.append((start, boundary))
        start = boundary
    return tuple(spans)


def decoded_spans(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, tuple[Span, ...]]:
    """The text of some ids and the span of each; `decode` shows bytes that are no character, or not yet, as U+FFFD."""
    text = decode(ids)
    ends: list[int] = []
    anchor = position = 0
    before = ""
    shown: list[str] = []  # what the text from `position` on looks like after each token that has no place yet
    for count in range(1, len(ids) + 1):
        # Decoded with the tokens placed last, since a decoder may treat the first token of a text differently.
        shown.append(decode(ids[anchor:count])[len(before) :])
        if _is_settled(shown, text, position):
            ends.extend(position + end for end in _ends(shown))
        elif len(shown) == _LONGEST_WINDOW_TOKENS:
            ends.extend([position] * len(shown))
        else:
            continue
        anchor, position, shown = count - len(shown), ends[-1], []
        before = decode(ids[anchor:count])
    if shown:
        ends.extend(position + end for end in _ends([*shown[:-1], text[position:]]))
    return text, tuple(pairwise([0, *ends[:-1], len(text)])) if ends else ()


def _is_settled(shown: Sequence[str], text: str, position: int) -> bool:
    """Whether what is shown is what the whole text says; a U+FFFD may still change, but not for four tokens on end."""
    last = shown[-1]
    may_change = last.endswith(_REPLACEMENT) and len(shown) < _LONGEST_CHARACTER_BYTES
    return last != "" and not may_change and text.startswith(last, position)


def _ends(shown: Sequence[str]) -> list[int]:
    """Where each token ends in what is shown after the last: where it stops agreeing with what is shown after the next.

    A U+FFFD that the next token leaves as it is, is still being made: it ends with the last token that does so.
    """
    ends = [len(shown[-1])]
    for later, earlier in pairwise(reversed(shown)):
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(earlier, later, strict=False)))
        unfinished = agreed == len(later) and later.endswith(_REPLACEMENT)
        ends.append(min(ends[-1], agreed - unfinished))
    return ends[::-1]
