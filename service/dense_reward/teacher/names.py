"""The names of teachers: NAME (the pair's sft model), NAME:reference and NAME:tilted=A.

NAME@REVISION instead of NAME pins the pair: once a pair of another revision has this name, requests are refused.
"""

import re
from dataclasses import dataclass

from dense_reward.errors import refuse

REFERENCE = "reference"
TILTED = "tilted="
LARGEST_TILT = 100.0
_PINNED = re.compile(r"(.+)@([0-9a-f]{16}|fake)")
"""A pair's name and its revision, which is a hash, or that of the fake engine. Others with an @ are only names."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TeacherName:
    """A pair (None: the first one), the tilt of its teacher (0: sft, -1: reference), and the revision it must have."""

    pair: str | None
    tilt: float
    revision: str | None = None

    def check_revision(self, served: str) -> None:
        """Raises RequestError(model_not_found) if the pair has another revision than the name."""
        if self.revision not in (None, served):
            message = (
                f"{self.pair} was replaced: it has revision {served}, not {self.revision}, so it is another "
                "teacher; serve the former pair again, or take the new name from GET /v1/models"
            )
            raise refuse("model_not_found", message, param="model")


def teacher_name(name: str | None) -> TeacherName:
    """What a name of a request stands for. Raises RequestError(model_not_found) for a tilt that is no such number."""
    if name is None:
        return TeacherName(None, 0.0)
    pair, which = _parts(name)
    named = _PINNED.fullmatch(pair)
    tilt = -1.0 if which == REFERENCE else _tilt(which.removeprefix(TILTED)) if which else 0.0
    return TeacherName(pair, tilt) if named is None else TeacherName(named[1], tilt, named[2])


def pinned(name: str, revision: str) -> str:
    """The name with the revision, unless it has one."""
    pair, which = _parts(name)
    return name if _PINNED.fullmatch(pair) else f"{pair}@{revision}{':' * bool(which)}{which}"


def _parts(name: str) -> tuple[str, str]:
    """The pair of a name, and which teacher of it; empty for the sft model."""
    pair, colon, which = name.rpartition(":")
    return (pair, which) if colon and (which == REFERENCE or which.startswith(TILTED)) else (name, "")


def chosen_name(in_path: str | None, in_body: str | None) -> str | None:
    """The name of the URL or of the body, with the revision that one of them has.

    Raises RequestError(model_not_found) if they are names of different teachers.
    """
    if in_path is None or in_body is None:
        return in_body if in_path is None else in_path
    path, body = teacher_name(in_path), teacher_name(in_body)
    revisions = {path.revision, body.revision} - {None}
    if (path.pair, path.tilt) != (body.pair, body.tilt) or len(revisions) > 1:
        message = f"this URL is for the teacher {in_path!r}: send this name as model, or change the URL"
        raise refuse("model_not_found", message, param="model")
    return in_path if body.revision is None else in_body


def names_of(pair: str, revision: str) -> list[str]:
    """The teachers of a pair that a list can name: tilted ones have any number.

    Each comes with its revision first, so that a client that takes the first name of a list is pinned.
    """
    return [one for name in (pair, f"{pair}:{REFERENCE}") for one in (pinned(name, revision), name)]


def _tilt(text: str) -> float:
    tilt = float(text) if _NUMBER.fullmatch(text) else None
    if tilt is None or not -1 <= tilt <= LARGEST_TILT:
        message = f"{TILTED}{text[:20]}: the tilt is a number from -1 (the reference) over 0 (sft) to {LARGEST_TILT:g}"
        raise refuse("model_not_found", f"{message}, such as NAME:{TILTED}1.0", param="model")
    return tilt
