"""Finds the answer of a response by a named rule. Each number is spelt in one way, so that answers compare as strings.

Pure functions of text. Must not import files, tokenizers or models.

The rule math_verify is the library of that name (Hugging Face), which parses numbers, LaTeX and sets, and compares them
as mathematics. It is imported when it is first used: pip install '.[eval]' in the project's folder.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from importlib import import_module
from types import ModuleType
from typing import Literal

AnswerChecker = Literal["final_answer", "last_number", "exact", "math_verify"]

RIGHT: Mapping[AnswerChecker, str] = {
    "final_answer": "X of its last line `#### X` equals that of the data",
    "last_number": "its last number equals the answer of the data",
    "exact": "it is, word for word, the response of the data",
    "math_verify": "math-verify finds the answer of the data in it",
}
"""When a response is right, by checker; one that is cut off is wrong."""

_ANSWER_LINE = re.compile(r"^####[ \t]+(.*)$", re.MULTILINE)
_NUMBER = re.compile(
    r"(?:\$\s*)?(?P<sign>[+-]?)(?:\$\s*)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:\s*\$)?"
)
# In running text a minus after a letter, a digit or a bracket subtracts: the last number of `7-5` is 5.
_NUMBER_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]])[+-])?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
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


def last_number(text: str) -> str | None:
    """The last number in a text, normalised; None without one. Fractions, powers and per cent signs are not read."""
    numbers = _NUMBER_IN_TEXT.findall(text.replace("\N{MINUS SIGN}", "-"))
    return normalise_number(numbers[-1]) if numbers else None


def answer_of(response: str, checker: AnswerChecker) -> str | None:
    """The answer that a complete response gives; None if it gives none.

    final_answer: its last line that starts with `#### `. last_number: its last number. exact: the whole text without
    surrounding white space. math_verify: what math-verify finds, in one spelling for each value (as far as sympy prints
    equal values alike), so that samples can vote; raises MissingExtraError without that library.
    """
    match checker:
        case "final_answer":
            return final_answer(response)
        case "last_number":
            return last_number(response)
        case "exact":
            return response.strip()
        case "math_verify":
            found = _math_verify().parse(response)
            return str(found[0]) if found else None


def meaning_of_right(checker: AnswerChecker) -> str:
    """A sentence for the end of a table: what counts as right."""
    return f"a response is right if it is not cut off and {RIGHT[checker]} (checker {checker})"


def is_right(response: str, wanted: str, checker: AnswerChecker) -> bool:
    """Whether a complete response gives the right answer, which is in the form of `right_answer`.

    Raises MissingExtraError if the checker is math_verify and that library is not installed.
    """
    if checker != "math_verify":
        return answer_of(response, checker) == wanted
    library = _math_verify()
    # an answer in data is LaTeX without its dollars, such as (1, 2), of which running text would be the 2
    gold = library.parse(f"${wanted}$") or library.parse(wanted)
    return bool(library.verify(gold, library.parse(response)))


class MissingExtraError(ValueError):
    """A library of an extra is not installed; the message says how to install it."""


def _math_verify() -> ModuleType:
    try:
        return import_module("math_verify")
    except ImportError:
        raise MissingExtraError(
            "the checker math_verify needs the extra eval: pip install '.[eval]' in the project's folder"
        ) from None


def right_answer(demonstration: str, stated: str | None, checker: AnswerChecker) -> str | None:
    """The answer that is right for a prompt, in the form of `answer_of`; None if it is not known.

    `demonstration`: the text of the demonstrated response. `stated`: the answer in the data, if there is one; exact
    does not read it. Raises ValueError if the checker is last_number and the stated answer is no number.
    """
    match checker:
        case "final_answer":
            return stated
        case "exact":
            return demonstration.strip()
        case "math_verify":
            found = [None, stated] if stated is not None else _math_verify().parse(demonstration)
            return str(found[1]) if found else None
        case "last_number":
            if stated is None:
                return last_number(demonstration)
            if _NUMBER.fullmatch(stated) is None:
                raise ValueError(f"the answer {stated!r} is no number, so the checker last_number never finds it")
            return stated
