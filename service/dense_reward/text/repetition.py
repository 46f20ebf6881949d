"""Responses that repeat what their prompt has opened, or their end of turn, which the encoder adds itself. Pure."""

import re
from dataclasses import dataclass

_TAG = re.compile(r"<[^<>\s][^<>\n]{0,60}>|\[/?[A-Z_]{2,40}\]")


_THOUGHT = re.compile(r"<(\w*(?:think|thought|reason)\w*)>", re.IGNORECASE)


def is_unclosed_thought(text: str, opening: str) -> bool:
    """Whether a prompt ends in an open thought that the response never closes, so that its answer is a thought too."""
    tags = [tag for tag in _THOUGHT.finditer(opening) if f"</{tag[1]}>" not in opening[tag.end() :]]
    return bool(tags) and f"</{tags[-1][1]}>" not in text


@dataclass(frozen=True, slots=True)
class Repetition:
    """`start`, `end`: text[start:end] is the text without its repetitions. `repeated`: what it repeats, shown to users.

    `contradicts`: the response starts with a part of what the prompt has already opened and closed.
    """

    start: int
    end: int
    repeated: str
    contradicts: bool = False


def repetition_of(text: str, opening: str, end_of_turn: str) -> Repetition | None:
    """What a response repeats; None if it repeats nothing. `end_of_turn` is empty if none is added to the response."""
    start, contradicts, opened = _repeated_opening(text, opening)
    end = start + _length_without(text[start:], end_of_turn)
    if not (start or contradicts or end < len(text)):
        return None
    return Repetition(start, end, opened or end_of_turn, contradicts)


def _length_without(text: str, end_of_turn: str) -> int:
    """Characters before the ends of turn, and the blanks after them, at the end of a text."""
    while end_of_turn and (stripped := text.rstrip()).endswith(end_of_turn):
        text = stripped.removesuffix(end_of_turn)
    return len(text)


def _repeated_opening(text: str, opening: str) -> tuple[int, bool, str]:
    """Characters at the start of the text that repeat the opening, a contradiction of it, and the first tag of both."""
    said = text.lstrip()
    for tag in _TAG.finditer(opening):
        if not said.startswith(tag.group()):
            continue
        words = [re.escape(word) for word in opening[tag.start() :].split()]
        found = re.match(r"\s*" + r"\s*".join(words), text)
        if found is None:
            return 0, True, tag.group()
        blank = opening[len(opening.rstrip()) :]
        rest = text[found.end() :]
        more = len(blank) if rest.startswith(blank) else len(rest) - len(rest.lstrip())
        return found.end() + more, False, tag.group()
    return 0, False, ""
