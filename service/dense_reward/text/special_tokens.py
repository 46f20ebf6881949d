"""Escapes special-token strings in users' text while a chat template renders, so that only the template's are special.

Otherwise a user could end a turn or open a system message by writing its special tokens. Pure; knows no tokenizer.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
Message = Mapping[str, JsonValue]


class SpecialTokenEscaper:
    """Replaces special-token strings in users' text by placeholders, and finds these again in the rendered text.

    `user_text`: everything that will be escaped. Placeholders are chosen so that they do not occur in it.
    """

    def __init__(self, special_strings: Sequence[str], user_text: object) -> None:
        # Longest first: a regex takes the first alternative that matches, and one special string can start another.
        longest_first = sorted(special_strings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special_strings else r"(?!)")
        # A text cannot contain its own hash, and a template cannot assemble that hash from several fields.
        self._mark = f"DenseReward{hashlib.sha256(repr(user_text).encode()).hexdigest()[:16]}Guard"
        self._escaped: list[str] = []

    def escape(self, value: JsonValue) -> JsonValue:
        """The value with every special-token string in it, keys included, replaced by a placeholder."""
        if isinstance(value, str):
            return self._escape_in(value)
        if isinstance(value, Mapping):
            return {self._escape_in(key): self.escape(entry) for key, entry in value.items()}
        if isinstance(value, Sequence):
            return [self.escape(entry) for entry in value]
        return value

    def _escape_in(self, text: str) -> str:
        return self._pattern.sub(self._placeholder, text)

    def _placeholder(self, match: re.Match[str]) -> str:
        self._escaped.append(match.group())
        return f"{self._mark}{len(self._escaped) - 1}E"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Cut rendered text at the placeholders: each part, and whether its special-token strings are the template's.

        A placeholder becomes the user's string again, with False.
        """
        # The pattern has a group, so re.split returns text and placeholders alternately: odd parts are placeholders.
        parts = re.split(f"{self._mark}([0-9]+)E", rendered)
        return [
            (self._escaped[int(part)], False) if index % 2 else (part, True) for index, part in enumerate(parts) if part
        ]
