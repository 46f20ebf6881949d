"""Responses that repeat what their prompt has opened, or their end of turn, which the encoder adds itself. Pure."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from dense_reward.errors import refuse

_TAG = re.compile(r"<[^<>\s][^<>\n]{0,60}>|\[/?[A-Z_]{2,40}\]")


_THOUGHT = re.compile(r"<([\w:]*(?:think|thought|reason)[\w:]*)>", re.IGNORECASE)

_END = re.compile(r"end|eo[smt]|stop|return|^</s>$", re.IGNORECASE)


@lru_cache(maxsize=64)
def ends_among(special_strings: tuple[str, ...]) -> tuple[str, ...]:
    """The special tokens that are named as ends of a text or a turn: data sets leave them at the end of responses."""
    return tuple(each for each in special_strings if _END.search(each))


def is_unclosed_thought(text: str, opening: str) -> bool:
    """Whether a prompt ends in an open thought that the response never closes, so that its answer is a thought too."""
    tags = [tag for tag in _THOUGHT.finditer(opening) if f"</{tag[1]}>" not in opening[tag.end() :]]
    return bool(tags) and f"</{tags[-1][1]}>" not in text


@dataclass(frozen=True, slots=True)
class Repetition:
    """`start`, `end`: text[start:end] is the text without its repetitions. `repeated`: what it repeats, shown to users.

    `contradicts`: the response starts with a part of what the prompt has already opened and closed, or closes it again.
    """

    start: int
    end: int
    repeated: str
    contradicts: bool = False


def repetition_of(text: str, opening: str, ends: Collection[str]) -> Repetition | None:
    """What a response repeats; None if it repeats nothing. `ends`: strings that must not stand at its end."""
    start, contradicts, opened = _repeated_opening(text, opening)
    closed = "" if start or contradicts else _closed_again(text, opening)
    end = start + _length_without(text[start:], ends)
    if not (start or contradicts or closed or end < len(text)):
        return None
    ended = next((each for each in ends if text.rstrip().endswith(each)), "")
    return Repetition(start, end, opened or closed or ended, contradicts or bool(closed))


def refuse_repetition(found: Repetition | None, *, add_eos: bool = True) -> None:
    """Raises RequestError(repeated_text) for a repetition, with the cure."""
    if found is None:
        return
    if found.contradicts:
        reason = f"has {found.repeated}, which its prompt has already opened and closed: choose other "
        reason += "template_kwargs or another response_prefix for responses with it, or leave it out"
    elif found.start:
        reason = f"repeats {found.repeated}, with which its prompt already ends: leave that out of the response"
    elif add_eos:
        reason = f"ends in {found.repeated}, but the end of turn is added to it: leave that out of the response"
    else:
        reason = f"ends in {found.repeated}, which would be plain text: leave it out, and send add_eos true"
    raise refuse("repeated_text", f"the response {reason}", param="response")


def _length_without(text: str, ends: Collection[str]) -> int:
    """Characters before the ends of turn, and the blanks after them, at the end of a text."""
    while end := next((each for each in ends if text.rstrip().endswith(each)), ""):
        text = text.rstrip().removesuffix(end)
    return len(text)


def _closed_again(text: str, opening: str) -> str:
    """The tag with which a response closes a thought that its prompt has closed already; "" if there is none."""
    for tag in _THOUGHT.finditer(opening):
        closing = f"</{tag[1]}>"
        if closing in opening[tag.end() :] and closing in text and tag.group() not in text.partition(closing)[0]:
            return closing
    return ""


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
