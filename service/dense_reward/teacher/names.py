"""The names of teachers: NAME (the pair's sft model), NAME:reference and NAME:tilted=A."""

import re
from dataclasses import dataclass

from dense_reward.errors import refuse

REFERENCE = "reference"
TILTED = "tilted="
LARGEST_TILT = 100.0
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TeacherName:
    """A pair (None: the first one) and the tilt of its teacher: 0 for sft, -1 for the reference."""

    pair: str | None
    tilt: float


def teacher_name(name: str | None) -> TeacherName:
    """What a name of a request stands for. Raises RequestError(model_not_found) for a tilt that is no such number."""
    if name is None:
        return TeacherName(None, 0.0)
    pair, colon, which = name.rpartition(":")
    if colon and which == REFERENCE:
        return TeacherName(pair, -1.0)
    if colon and which.startswith(TILTED):
        return TeacherName(pair, _tilt(which.removeprefix(TILTED)))
    return TeacherName(name, 0.0)


def chosen_name(in_path: str | None, in_body: str | None) -> str | None:
    """The name of the URL or of the body. Raises RequestError(model_not_found) if both are given and differ."""
    if in_path is not None and in_body not in (None, in_path):
        message = f"this URL is for the teacher {in_path!r}: send this name as model, or change the URL"
        raise refuse("model_not_found", message, param="model")
    return in_body if in_path is None else in_path


def names_of(pair: str) -> list[str]:
    """The teachers of a pair that a list can name: tilted ones have any number."""
    return [pair, f"{pair}:{REFERENCE}"]


def _tilt(text: str) -> float:
    tilt = float(text) if _NUMBER.fullmatch(text) else None
    if tilt is None or not -1 <= tilt <= LARGEST_TILT:
        message = f"{TILTED}{text[:20]}: the tilt is a number from -1 (the reference) over 0 (sft) to {LARGEST_TILT:g}"
        raise refuse("model_not_found", f"{message}, such as NAME:{TILTED}1.0", param="model")
    return tilt
