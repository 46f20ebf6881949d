"""The class of each token of a response, by its text. Pure."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

TokenClass = Literal["word start", "continuation", "number", "punctuation", "whitespace", "special"]
CLASSES: tuple[TokenClass, ...] = ("word start", "continuation", "number", "punctuation", "whitespace", "special")
_SPECIAL = re.compile(r"<\|[^\s|]+\|>|</?[a-z_]+>|<｜[^｜]+｜>|\[/?[A-Z_]{3,}\]|<\|?[a-z_]+\|?>")


def token_classes(tokens: Sequence[str]) -> list[int]:
    """The index in CLASSES of each token.

    A token with a digit is a number, one without letters punctuation. A word begins at the start, after a space (also
    the token's own) or after a token that is no word; all else continues one. A special token looks like <|end|>, </s>
    or [INST]: statistics have no tokenizer.
    """
    found: list[int] = []
    after_word = False
    for token in tokens:
        name = _alone(token)
        if name == "word start" and after_word and not token[:1].isspace():
            name = "continuation"
        found.append(CLASSES.index(name))
        after_word = name in {"word start", "continuation"} and not token[-1:].isspace()
    return found


@lru_cache(65_536)
def _alone(token: str) -> TokenClass:
    if _SPECIAL.fullmatch(token):
        return "special"
    if token and not token.strip():
        return "whitespace"
    if any(map(str.isdigit, token)):
        return "number"
    # Of a character that several tokens share, one token has the text and the others none. They are no sign either.
    return "word start" if not token or any(map(str.isalpha, token)) or "\ufffd" in token else "punctuation"
