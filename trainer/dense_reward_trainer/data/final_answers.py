"""Final answers: where a response states one, and one spelling for each number, so that answers compare as strings.

Pure functions of text. Must not know demonstrations, samples or who is compared with whom.
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
    """One spelling for each number: `$1,080.50.` is `1080.5`, `5.0` is `5`.

    Removes white space around, trailing periods, `$`, thousands commas, a plus sign, leading and trailing zeros.
    What is no number (`12%`, `x = 3`, `1,2`) keeps its text but for white space around and trailing periods.
    Exact for any length; idempotent.
    """
    trimmed = text.strip().rstrip(". \t\r\n")
    number = _NUMBER.fullmatch(trimmed)
    if number is None:
        return trimmed
    plain = format(Decimal(number["sign"] + number["digits"].replace(",", "")), "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def final_answer(text: str) -> str | None:
    """What the last line that starts with `#### ` states (GSM8K's convention), normalised; None where there is none."""
    lines = _ANSWER_LINE.findall(text)
    return (normalise_number(lines[-1]) or None) if lines else None
