import random
import re

import pytest
from dense_reward_trainer.data.arithmetic import ArithmeticOptions, Problem, generate, worked_addition
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

COLUMN = re.compile(r"(\d(?:\+\d)+)=(\d+) write (\d) carry ([01])")
additions = st.integers(1, 9).flatmap(
    lambda digits: st.tuples(*[st.integers(10 ** (digits - 1), 10**digits - 1)] * 2, st.just(digits))
)


def addends_of(problem: Problem) -> tuple[int, int]:
    found = re.fullmatch(r"Add (\d+) and (\d+)\.", problem.prompt)
    assert found is not None
    return int(found[1]), int(found[2])


def assert_right(a: int, b: int, response: str, digits: int) -> None:
    *columns, last = response.split("\n")
    assert len(columns) == digits
    carry = 0
    written_digits = ""
    for place, line in enumerate(columns):
        column = COLUMN.fullmatch(line)
        assert column is not None, line
        addends = [int(addend) for addend in column[1].split("+")]
        expected = [int(str(a)[-1 - place]), int(str(b)[-1 - place])]
        assert addends == (expected if place == 0 else [*expected, carry])
        assert sum(addends) == int(column[2]) == 10 * int(column[4]) + int(column[3])
        carry = int(column[4])
        written_digits = column[3] + written_digits
    assert int(f"{carry}{written_digits}") == a + b
    assert last == f"#### {a + b}"


def test_a_worked_addition_reads_column_by_column() -> None:
    assert (
        worked_addition(478, 365, 3)
        == "8+5=13 write 3 carry 1\n7+6+1=14 write 4 carry 1\n4+3+1=8 write 8 carry 0\n#### 843"
    )


def test_the_last_carry_becomes_the_leading_digit() -> None:
    assert worked_addition(95, 14, 2) == "5+4=9 write 9 carry 0\n9+1+0=10 write 0 carry 1\n#### 109"


@given(additions)
def test_every_column_and_the_sum_are_right(addition: tuple[int, int, int]) -> None:
    a, b, digits = addition
    assert_right(a, b, worked_addition(a, b, digits), digits)


@pytest.mark.parametrize(("a", "b"), [(99, 500), (500, 1000), (-123, 456), (0, 100)])
def test_an_addend_of_another_length_is_refused(a: int, b: int) -> None:
    with pytest.raises(ValueError, match="does not have exactly 3 digits"):
        worked_addition(a, b, 3)


@given(st.integers(1, 4), st.integers(1, 81), st.integers())
def test_generated_problems_are_right_unique_and_as_many_as_asked(digits: int, count: int, seed: int) -> None:
    problems = generate(ArithmeticOptions(demonstrations=count, digits=digits, seed=seed))
    assert len(problems) == len({problem.prompt for problem in problems}) == count
    for problem in problems:
        assert problem.clean
        a, b = addends_of(problem)
        assert problem.answer == a + b
        assert_right(a, b, problem.response, digits)


@pytest.mark.parametrize("novices", [0.0, 0.6, 1.0])
def test_novices_forget_the_carry_in_sums_that_have_one(novices: float) -> None:
    options = ArithmeticOptions(demonstrations=50, digits=2, novices=novices)
    problems = generate(options)
    assert sum(not problem.clean for problem in problems) == round(50 * novices)
    for problem in problems:
        a, b = addends_of(problem)
        assert a % 10 + b % 10 >= 10
        assert problem.answer == a + b
        assert problem.response == worked_addition(a, b, 2, forgets_carry=not problem.clean)
        assert problem.clean == problem.response.endswith(f"#### {a + b}")
    experts = generate(options.model_copy(update={"novices": 0.0}))
    assert [problem.prompt for problem in problems] == [problem.prompt for problem in experts]


def test_novices_answer_only_sums_of_two_digit_numbers_that_carry() -> None:
    with pytest.raises(ValidationError, match="set digits to 2"):
        ArithmeticOptions(novices=0.5)
    with pytest.raises(ValidationError, match="only 3645 problems of 2-digit numbers are drawn"):
        ArithmeticOptions(novices=0.5, digits=2, demonstrations=3646)


def test_every_existing_problem_can_be_asked_for() -> None:
    problems = generate(ArithmeticOptions(demonstrations=81, digits=1))
    assert {addends_of(problem) for problem in problems} == {(a, b) for a in range(1, 10) for b in range(1, 10)}


def test_more_problems_than_exist_are_refused_with_the_number_available() -> None:
    with pytest.raises(ValidationError, match="only 81 problems of 1-digit numbers are drawn: set at most 81"):
        ArithmeticOptions(demonstrations=82, digits=1)


@given(st.integers(1, 81), st.floats(0, 1), st.integers(0, 1000))
def test_label_noise_spoils_the_stated_fraction_by_one_digit_each(count: int, noise: float, seed: int) -> None:
    problems = generate(ArithmeticOptions(demonstrations=count, digits=2, label_noise=noise, seed=seed))
    assert sum(not problem.clean for problem in problems) == round(noise * count)
    for problem in problems:
        right = worked_addition(*addends_of(problem), 2)
        wrong_places = sum(old != new for old, new in zip(right, problem.response, strict=True))
        assert wrong_places == (0 if problem.clean else 1)


def prompts(problems: list[Problem]) -> list[str]:
    return [problem.prompt for problem in problems]


def test_the_seed_alone_decides_the_problems_and_noise_leaves_the_prompts_alone() -> None:
    options = ArithmeticOptions(demonstrations=50, seed=1)
    assert generate(options) == generate(options)
    assert prompts(generate(options)) != prompts(generate(options.model_copy(update={"seed": 2})))
    assert prompts(generate(options)) == prompts(generate(options.model_copy(update={"label_noise": 0.5})))


def test_generating_leaves_the_global_random_state_alone() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    generate(ArithmeticOptions(demonstrations=10, label_noise=0.5))
    assert random.random() == expected


@pytest.mark.parametrize(
    "options", [{"digits": 0}, {"digits": 10}, {"demonstrations": 0}, {"label_noise": 1.5}, {"digit": 3}]
)
def test_options_out_of_range_or_unknown_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        ArithmeticOptions.model_validate(options)


def test_every_option_is_described() -> None:
    assert all(field.description for field in ArithmeticOptions.model_fields.values())


def test_several_digit_counts_share_the_problems_evenly_and_are_mixed() -> None:
    problems = generate(ArithmeticOptions(demonstrations=31, digits=(2, 4)))
    counts = [len(str(addends_of(problem)[0])) for problem in problems]
    assert (counts.count(2), counts.count(4)) == (16, 15)
    assert counts != sorted(counts)
    with pytest.raises(ValidationError, match="several different ones"):
        ArithmeticOptions(digits=(2, 2))
    with pytest.raises(ValidationError, match="several different ones"):
        ArithmeticOptions(digits=())


@given(st.integers(1, 4), st.integers(0, 1000))
def test_a_word_problem_tells_two_steps_and_its_solution_follows_them(digits: int, seed: int) -> None:
    (problem,) = generate(ArithmeticOptions(kind="two_step", demonstrations=1, digits=digits, seed=seed))
    numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
    *steps, last = problem.response.split("\n")
    assert len(numbers) == 3
    assert all(len(str(number)) == digits for number in numbers)
    now = numbers[0]
    for line, change in zip(steps, numbers[1:], strict=True):
        equation = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line)
        assert equation is not None, line
        assert (int(equation[1]), int(equation[3])) == (now, change)
        now = now + change if equation[2] == "+" else now - change
        assert int(equation[4]) == now >= 0
    assert last == f"#### {now}"
    assert problem.answer == now


def test_word_problems_are_more_or_fewer_as_their_words_say() -> None:
    for problem in generate(ArithmeticOptions(kind="two_step", demonstrations=200, digits=2)):
        words = re.findall(r"(more|gives away|loses|sells)", problem.prompt)
        signs = re.findall(r"\d([+-])\d", problem.response)
        assert [word == "more" for word in words] == [sign == "+" for sign in signs]


@pytest.mark.parametrize("digits", [1, 2])
def test_word_problems_are_unique_and_can_be_noisy(digits: int) -> None:
    problems = generate(ArithmeticOptions(kind="two_step", demonstrations=300, digits=digits, label_noise=0.1))
    assert len({problem.prompt for problem in problems}) == 300
    assert sum(not problem.clean for problem in problems) == 30
