"""Planted errors: which token is wrong, and which tokens it is compared with."""

import random

import numpy as np
import pytest
from dense_reward_trainer.credit.error_localisation import (
    MAX_TRIES,
    ErrorScores,
    PlantedError,
    error_and_others,
    proposals,
)
from dense_reward_trainer.data.corruption import Corrupter, Corruption, number_corruption
from dense_reward_trainer.data.sources import ChatMessage, Demonstration
from hypothesis import given
from hypothesis import strategies as st


def answer(response: str) -> Demonstration:
    return Demonstration((ChatMessage("user", "?"), ChatMessage("assistant", response)), None, "here:1")


def planted(right: str, wrong: str, start: int, end: int) -> PlantedError:
    return PlantedError(answer(right), Corruption(wrong, start, end))


def one_by_one(text: str) -> list[tuple[int, int]]:
    """A scored text with a token for each character, and an end of turn."""
    return [*((i, i + 1) for i in range(len(text))), (len(text), len(text))]


def test_the_wrong_token_stands_against_all_others_the_end_of_turn_included() -> None:
    error, others = error_and_others(planted("1+2=3", "1+2=8", 4, 5), one_by_one("1+2=8"), "tokens")
    assert (error, others) == (4, [0, 1, 2, 3, 5])


def test_or_against_the_other_tokens_with_a_digit() -> None:
    error, others = error_and_others(planted("1+2=3", "1+2=8", 4, 5), one_by_one("1+2=8"), "digit_tokens")
    assert (error, others) == (4, [0, 2])


def test_a_number_of_several_tokens_is_wrong_from_its_first_changed_one_and_its_others_are_left_out() -> None:
    error, others = error_and_others(planted("a 1234 5", "a 1274 5", 2, 6), one_by_one("a 1274 5"), "digit_tokens")
    assert (error, others) == (4, [7])


def test_a_token_that_reaches_beyond_the_error_counts_as_touched() -> None:
    offsets = [(0, 2), (2, 4), (4, 6)]
    error, others = error_and_others(planted("ab12cd", "ab13cd", 2, 4), offsets, "tokens")
    assert (error, others) == (1, [0, 2])


@given(st.integers(0, 10_000), st.text(alphabet="ab 0123456789\n", min_size=1, max_size=60))
def test_the_error_is_never_among_what_it_stands_against(seed: int, text: str) -> None:
    corruption = number_corruption(text, random.Random(seed))
    if corruption is None:
        return
    error, others = error_and_others(PlantedError(answer(text), corruption), one_by_one(text), "tokens")
    assert text[error] != corruption.text[error]
    assert all(i == len(text) or text[i] == corruption.text[i] for i in others)


def test_errors_are_seeded_and_those_of_an_answer_differ() -> None:
    corrupter, demonstration = Corrupter.of("number", []), answer("12 + 30 = 42")
    first = proposals(corrupter, demonstration, [0, 3])
    assert first == proposals(corrupter, demonstration, [0, 3])
    assert first != proposals(corrupter, demonstration, [1, 3])
    assert len({one.text for one in first}) == len(first) <= MAX_TRIES
    assert proposals(corrupter, answer("none"), [0, 3]) == []


def test_an_error_hits_where_it_is_lowest_and_shares_a_tie() -> None:
    others = np.array([0.0, -1.0, -2.0, -2.0], dtype=np.float32)
    assert [ErrorScores(error, others).hit for error in (-3.0, -2.0, -1.0)] == [1.0, pytest.approx(1 / 3), 0.0]
    assert [ErrorScores(error, others).auroc for error in (-3.0, -1.0, 1.0)] == [1.0, 0.375, 0.0]
