import sys
from decimal import Decimal

import pytest
from dense_reward_trainer.data.final_answers import (
    AnswerChecker,
    MissingExtraError,
    answer_of,
    final_answer,
    is_right,
    last_number,
    normalise_number,
    right_answer,
)
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("72", "72"),
        (" 72 ", "72"),
        ("72.", "72"),
        ("5.0", "5"),
        ("5.50", "5.5"),
        (".5", "0.5"),
        ("007", "7"),
        ("+3", "3"),
        ("-0", "0"),
        ("100", "100"),
        ("1,080", "1080"),
        ("109,200,000", "109200000"),
        ("$1,080.50.", "1080.5"),
        ("$ 18", "18"),
        ("18$", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
    ],
)
def test_a_number_has_one_spelling(text: str, normalised: str) -> None:
    assert normalise_number(text) == normalised


@pytest.mark.parametrize("text", ["12%", "1,2", "12,34", "1,0800", "x = 3", "5 dollars", "1e3", "٣", "$", "-", "1.2.3"])
def test_what_is_no_number_keeps_its_text(text: str) -> None:
    assert normalise_number(f"  {text}. ") == text


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_the_value_of_a_number_is_kept_whatever_its_spelling(number: Decimal) -> None:
    plain = normalise_number(f"{number:f}")
    assert Decimal(plain) == number
    assert normalise_number(f"${number:,f}.") == plain


@given(st.text(alphabet="0123456789.,$+-% x\n"))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise_number(normalise_number(text)) == normalise_number(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6*7=42\n#### 42", "42"),
        ("#### 1,080", "1080"),
        ("#### 5.0\n", "5"),
        ("#### 1\nNo, wait.\n#### 2\nDone.", "2"),
        ("####\t$3.\r\n", "3"),
        ("#### Paris.", "Paris"),
        ("42", None),
        ("####42", None),
        ("a #### 42", None),
        ("##### 42", None),
        ("#### \nmore", None),
        ("", None),
    ],
)
def test_the_final_answer_is_what_the_last_marked_line_states(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("7 apples, then 3 more: $1,080.50.", "1080.5"),
        ("12-5", "5"),
        ("f(2)-3", "3"),
        ("It falls to -7 degrees", "-7"),
        ("It falls to \N{MINUS SIGN}7", "-7"),
        ("-$5 in all", "-5"),
        ("about .50 of it", "0.5"),
        ("1, 2 and 3", "3"),
        ("1,2", "2"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("checker", "answers"),
    [("final_answer", ("3", None)), ("last_number", ("3", "4")), ("exact", ("2 and\n#### 3", "It is 4."))],
)
def test_an_answer_is_found_by_its_checker(checker: AnswerChecker, answers: tuple[str | None, str | None]) -> None:
    assert (answer_of("2 and\n#### 3\n", checker), answer_of(" It is 4.", checker)) == answers


@pytest.mark.parametrize(
    ("checker", "stated", "right"),
    [
        ("final_answer", "3", "3"),
        ("final_answer", None, None),
        ("last_number", "3", "3"),
        ("last_number", None, "9"),
        ("exact", "3", "It is 9."),
        ("exact", None, "It is 9."),
    ],
)
def test_the_right_answer_has_the_form_that_its_checker_finds(
    checker: AnswerChecker, stated: str | None, right: str | None
) -> None:
    assert right_answer("It is 9. ", stated, checker) == right


def test_an_answer_that_no_checker_of_numbers_can_find_is_refused() -> None:
    with pytest.raises(ValueError, match="'yes' is no number"):
        right_answer("yes", "yes", "last_number")


MATHS = [
    ("so it is $5.00", "5", True),
    ("the answer is \\boxed{1/2}", "\\frac{1}{2}", True),
    ("#### 1,080", "1080", True),
    ("\\boxed{(1,2)}", "(1, 2)", True),
    ("x is \\boxed{\\frac{\\sqrt{8}}{2}}", "\\sqrt{2}", True),
    ("#### 19", "18", False),
    ("so \\boxed{3}", "x=3", True),
    ("it costs $18.", "$18", True),
    ("no number here", "12", False),
]


@pytest.mark.parametrize(("text", "wanted", "right"), MATHS)
def test_math_verify_compares_as_mathematics(text: str, wanted: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert is_right(text, wanted, "math_verify") is right


def test_math_verify_gives_equal_values_one_spelling_so_that_they_vote_together() -> None:
    pytest.importorskip("math_verify")
    assert answer_of("\\boxed{0.5}", "math_verify") == answer_of("so $\\frac12$.", "math_verify") == "1/2"
    assert answer_of("none", "math_verify") is None
    assert right_answer("it is \\boxed{(1,2)}", None, "math_verify") == "(1,2)"
    assert right_answer("it is \\boxed{7}", "8", "math_verify") == "8"
    assert right_answer("none", None, "math_verify") is None


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[eval\]'"):
        answer_of("7", "math_verify")
