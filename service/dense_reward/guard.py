"""Special-token strings inside users' text: hidden while a template renders, so that the template's own stay apart.

Pure; knows no tokenizer.
"""

import re
from collections.abc import Mapping, Sequence

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
Message = Mapping[str, JsonValue]


class Guard:
    """Stand-ins for special-token strings in users' text, so that a template's own stay apart from them."""

    def __init__(self, special_strings: Sequence[str], used: object) -> None:
        self._pattern = re.compile("|".join(re.escape(s) for s in sorted(special_strings, key=len, reverse=True)))
        self._active = bool(special_strings)
        text, nonce = repr(used), 0
        while f"DenseReward{nonce}Guard" in text:
            nonce += 1
        self._mark = f"DenseReward{nonce}Guard"
        self._hidden: list[str] = []

    def hide(self, value: JsonValue) -> JsonValue:
        """The value with every special-token string in it replaced by a stand-in."""
        if isinstance(value, str):
            return self._pattern.sub(self._stand_in, value) if self._active else value
        if isinstance(value, Mapping):
            return {key: self.hide(entry) for key, entry in value.items()}
        if isinstance(value, Sequence):
            return [self.hide(entry) for entry in value]
        return value

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
