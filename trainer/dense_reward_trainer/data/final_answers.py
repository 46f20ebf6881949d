"""Finds the final answer of a response, and spells each number in one way, so that answers compare as strings.

Pure functions of text. Must not import files, tokenizers or models.
"""

import re
from decimal import Decimal

_ANSWER_LINE = re.compile(r"^####[ \t]+(.*)$", re.MULTILINE)
_NUMBER = re.compile(
    r"(?:\$\s*)?(?P<sign>[+-]?)(?:\$\s*)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:\s*\$)?"
)


def normalise_number(text: str) -> str:
    """One spelling for each number: `$1,080.50.` becomes `1080.5`, `5.0` becomes `5`.

    Removes surrounding white space, trailing periods, `$`, thousands commas, a plus sign, leading and trailing zeros.
    Any other text (`12%`, `x = 3`, `1,2`) only loses surrounding white space and trailing periods. Exact for numbers of
    any length; idempotent.
    """
    trimmed = text.strip().rstrip(". \t\r\n")
    number = _NUMBER.fullmatch(trimmed)
    if number is None:
        return trimmed
    plain = format(Decimal(number["sign"] + number["digits"].replace(",", "")), "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def final_answer(text: str) -> str | None:
    """The normalised answer in the last line that starts with `#### ` (GSM8K's convention); None without one."""
    lines = _ANSWER_LINE.findall(text)
    return (normalise_number(lines[-1]) or None) if lines else None
