"""Offsets mapping: for each token the span of its text, in code points. Spans cover the text without gaps or overlap.

A character that is split over several tokens belongs to the last of them. Pure; knows no tokenizer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile

Span = tuple[int, int]
_REPLACEMENT = "\ufffd"  # what bytes decode to if they are not a character, or not yet a complete one
_LONGEST_CHARACTER_BYTES = 4
_LONGEST_WINDOW_TOKENS = 64  # limits the work on bytes whose text never agrees with the whole text


def monotone_spans(offsets: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Spans that cover [0, length), from the offsets of a tokenizer, which can overlap or leave gaps.

    A span ends where its token ends, or earlier if the next token starts inside the same character. Text that the
    tokenizer skipped belongs to the token after it.
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
    """The text of some ids and the span of each id. `decode` returns U+FFFD for bytes that are not a whole character.

    Decodes growing windows of ids. `position` is where the text of all earlier windows ends. `window` holds, for each
    id of the current window, the text after `position` that is decoded up to this id. The window ends when its last
    text agrees with `text`.
    """
    text = decode(ids)
    ends: list[int] = []
    anchor = position = 0
    before = ""
    window: list[str] = []
    for count in range(1, len(ids) + 1):
        # Decoded after the ids of the previous window: a decoder can treat the first token of a text differently.
        window.append(decode(ids[anchor:count])[len(before) :])
        if _is_settled(window, text, position):
            ends.extend(position + end for end in _ends(window))
        elif len(window) == _LONGEST_WINDOW_TOKENS:
            ends.extend([position] * len(window))
        else:
            continue
        anchor, position, window = count - len(window), ends[-1], []
        before = decode(ids[anchor:count])
    if window:
        ends.extend(position + end for end in _ends([*window[:-1], text[position:]]))
    return text, tuple(pairwise([0, *ends[:-1], len(text)])) if ends else ()


def _is_settled(window: Sequence[str], text: str, position: int) -> bool:
    """Whether the window's last text agrees with the whole text.

    A U+FFFD at the end of that text can still become a character, but not after four tokens: a character has at most
    four bytes.
    """
    last = window[-1]
    can_change = last.endswith(_REPLACEMENT) and len(window) < _LONGEST_CHARACTER_BYTES
    return last != "" and not can_change and text.startswith(last, position)


def _ends(window: Sequence[str]) -> list[int]:
    """End offset of each token in the final decoded text.

    It is the length of the prefix that the decoded text keeps when the next token is appended. A U+FFFD at its end that
    the next token leaves unchanged is an unfinished character: it belongs to the last token that leaves it unchanged.
    """
    ends = [len(window[-1])]
    for later, earlier in pairwise(reversed(window)):
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(earlier, later, strict=False)))
        unfinished = agreed == len(later) and later.endswith(_REPLACEMENT)
        ends.append(min(ends[-1], agreed - unfinished))
    return ends[::-1]
