import random
import re

import pytest
from dense_reward_trainer.data.corruption import Corrupter, ErrorKind, digit_corruption, number_corruption
from hypothesis import given
from hypothesis import strategies as st

texts = st.text(
    alphabet=st.one_of(st.sampled_from("0123456789 +=#\n<>٣²é🙂"), st.characters(exclude_categories=["Cs"]))
)
seeds = st.integers(0, 2**32)


@given(texts.filter(lambda text: re.search("[0-9]", text) is not None), seeds)
def test_corrupt_changes_exactly_one_digit_into_another_digit_and_keeps_the_length(text: str, seed: int) -> None:
    corruption = digit_corruption(text, random.Random(seed))
    changed = [place for place, pair in enumerate(zip(text, corruption.text, strict=True)) if pair[0] != pair[1]]
    assert changed == [corruption.start]
    assert corruption.end == corruption.start + 1
    assert re.fullmatch("[0-9]", text[corruption.start])
    assert re.fullmatch("[0-9]", corruption.text[corruption.start])


@given(st.text(alphabet="abc ٣²#"), seeds)
def test_corrupt_refuses_a_response_without_an_ascii_digit(text: str, seed: int) -> None:
    with pytest.raises(ValueError, match="no digit to replace"):
        digit_corruption(text, random.Random(seed))


def test_corrupt_reaches_every_digit_and_every_wrong_value_equally_often() -> None:
    rng = random.Random(0)
    seen: dict[str, int] = {}
    for _ in range(3600):
        text = digit_corruption("a1b2", rng).text
        seen[text] = seen.get(text, 0) + 1
    assert seen.keys() == {f"a{x}b2" for x in "023456789"} | {f"a1b{x}" for x in "013456789"}
    assert all(130 <= count <= 270 for count in seen.values())


@given(texts, seeds)
def test_number_corruption_replaces_one_whole_number_by_another_of_the_same_length(text: str, seed: int) -> None:
    corruption = number_corruption(text, random.Random(seed))
    spans = [match.span() for match in re.finditer("[0-9]+", text)]
    if corruption is None:
        assert spans == []
        return
    start, end = corruption.start, corruption.end
    old, new = text[start:end], corruption.text[start:end]
    assert (start, end) in spans
    assert corruption.text == text[:start] + new + text[end:]
    assert new != old
    assert re.fullmatch("[0-9]+", new)
    assert len(new) == len(old)
    assert new[0] != "0" or old[0] == "0"


def test_number_corruption_draws_numbers_not_digits_uniformly() -> None:
    rng = random.Random(0)
    corruptions = [number_corruption("7 apples and 123456 pears", rng) for _ in range(1000)]
    short = sum(corruption is not None and corruption.start == 0 for corruption in corruptions)
    assert 430 <= short <= 570


def test_number_corruption_reaches_every_other_number_of_the_length() -> None:
    rng = random.Random(0)
    drawn = [number_corruption("x=5", rng) for _ in range(300)]
    assert {corruption.text for corruption in drawn if corruption is not None} == {
        f"x={n}" for n in (1, 2, 3, 4, 6, 7, 8, 9)
    }


def test_number_corruption_takes_numbers_longer_than_python_turns_into_integers() -> None:
    text = "9" * 5000
    corruption = number_corruption(text, random.Random(0))
    assert corruption is not None
    assert len(corruption.text) == 5000
    assert corruption.text != text


def test_the_same_seed_plants_the_same_error() -> None:
    text = "3*14 = 42, so 42 jars"
    assert digit_corruption(text, random.Random(5)) == digit_corruption(text, random.Random(5))
    assert number_corruption(text, random.Random(5)) == number_corruption(text, random.Random(5))


ANSWERS = ("Ada buys 12 pens\n12+3=15\n#### 15", "Eva sells 40 cups\n40-9=31\n#### 31", "nothing here")


@given(st.sampled_from(["digit", "number", "word", "step"]), st.sampled_from(ANSWERS), seeds)
def test_every_kind_of_error_stays_within_its_span_and_is_as_long(kind: ErrorKind, text: str, seed: int) -> None:
    corruption = Corrupter.of(kind, ANSWERS)(text, random.Random(seed))
    if corruption is None:
        assert text == "nothing here"
        return
    assert len(corruption.text) == len(text)
    assert corruption.text != text
    assert corruption.text[: corruption.start] == text[: corruption.start]
    assert corruption.text[corruption.end :] == text[corruption.end :]


def test_words_are_exchanged_for_words_of_the_data_that_begin_alike() -> None:
    corrupter = Corrupter.of("word", ANSWERS)
    drawn = {corrupter(ANSWERS[0], random.Random(seed)) for seed in range(100)}
    changed = {one.text[one.start : one.end] for one in drawn if one is not None}
    assert changed == {"Eva", "cups", "here", "buys", "pens"}


def test_words_of_every_script_are_exchanged() -> None:
    corrupter = Corrupter.of("word", ["größer", "kürzer", "больше", "меньше"])
    drawn = {corrupter("größer", random.Random(seed)) for seed in range(20)}
    assert {one.text for one in drawn if one is not None} == {"kürzer", "больше", "меньше"}


def test_a_step_is_exchanged_for_another_step_and_the_final_answer_is_none() -> None:
    corrupter = Corrupter.of("step", ANSWERS)
    drawn = {corrupter(ANSWERS[0], random.Random(seed)) for seed in range(50)}
    assert {one.text for one in drawn if one is not None} == {ANSWERS[0].replace("12+3=15", "40-9=31")}
    assert corrupter("40-9=31", random.Random(0)) is None
