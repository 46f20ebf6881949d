"""Special-token strings inside users' text: hidden while a template renders, so that the template's own stay apart.

Pure; knows no tokenizer.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
Message = Mapping[str, JsonValue]


class Guard:
    """Stand-ins for special-token strings in users' text. `used` is all that text: it must not hold a stand-in."""

    def __init__(self, special_strings: Sequence[str], used: object) -> None:
        longest_first = sorted(special_strings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special_strings else r"(?!)")
        # A text cannot hold its own hash, nor can a template piece it together from several fields.
        self._mark = f"DenseReward{hashlib.sha256(repr(used).encode()).hexdigest()[:16]}Guard"
        self._hidden: list[str] = []

    def hide(self, value: JsonValue) -> JsonValue:
        """The value with every special-token string in it, keys included, replaced by a stand-in."""
        if isinstance(value, str):
            return self._hide_in(value)
        if isinstance(value, Mapping):
            return {self._hide_in(key): self.hide(entry) for key, entry in value.items()}
        if isinstance(value, Sequence):
            return [self.hide(entry) for entry in value]
        return value

    def _hide_in(self, text: str) -> str:
        return self._pattern.sub(self._stand_in, text)

    def _stand_in(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{self._mark}{len(self._hidden) - 1}E"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Stretches of text, each with whether special-token strings in it are the template's own."""
        stretches = re.split(f"{self._mark}([0-9]+)E", rendered)
        return [
            (self._hidden[int(text)], False) if index % 2 else (text, True)
            for index, text in enumerate(stretches)
            if text
        ]
