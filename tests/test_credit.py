"""The credit job: where an error is planted, which tokens it stands against, and the job over a real service."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.corruption import Corruption, number_corruption
from dense_reward_trainer.credit import Planted, groups, plant
from dense_reward_trainer.credit_config import CreditConfig
from dense_reward_trainer.data import Demonstration, Message
from dense_reward_trainer.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from served_pair import ServedPair, free_port, write_pair


def answer(response: str) -> Demonstration:
    return Demonstration((Message("user", "?"), Message("assistant", response)), None, "here:1")


def planted(right: str, wrong: str, start: int, end: int) -> Planted:
    return Planted(answer(right), Corruption(wrong, start, end))


def one_by_one(text: str) -> list[tuple[int, int]]:
    """A token for each character, and an end of turn."""
    return [*((i, i + 1) for i in range(len(text))), (len(text), len(text))]


def config(**changes: object) -> CreditConfig:
    return CreditConfig.model_validate({"output_dir": "run", "data": {"source": "arithmetic"}, **changes})


def test_the_wrong_token_stands_against_all_others_the_end_of_turn_included() -> None:
    error, others = groups(planted("1+2=3", "1+2=8", 4, 5), one_by_one("1+2=8"), "tokens")
    assert (error, others) == (4, [0, 1, 2, 3, 5])


def test_or_against_the_other_tokens_with_a_digit() -> None:
    error, others = groups(planted("1+2=3", "1+2=8", 4, 5), one_by_one("1+2=8"), "digit_tokens")
    assert (error, others) == (4, [0, 2])


def test_a_number_of_several_tokens_is_wrong_from_its_first_changed_one_and_its_others_are_left_out() -> None:
    error, others = groups(planted("a 1234 5", "a 1274 5", 2, 6), one_by_one("a 1274 5"), "digit_tokens")
    assert (error, others) == (4, [7])


def test_a_token_that_reaches_beyond_the_error_counts_as_touched() -> None:
    offsets = [(0, 2), (2, 4), (4, 6)]
    error, others = groups(planted("ab12cd", "ab13cd", 2, 4), offsets, "tokens")
    assert (error, others) == (1, [0, 2])


@given(st.integers(0, 10_000), st.text(alphabet="ab 0123456789\n", min_size=1, max_size=60))
def test_the_error_is_never_among_what_it_stands_against(seed: int, text: str) -> None:
    corruption = number_corruption(text, random.Random(seed))
    if corruption is None:
        return
    error, others = groups(Planted(answer(text), corruption), one_by_one(text), "tokens")
    assert text[error] != corruption.text[error]
    assert all(i == len(text) or text[i] == corruption.text[i] for i in others)


def test_errors_are_seeded_and_each_answer_gets_one() -> None:
    answers = [answer(f"{i} + {i} = {2 * i}") for i in range(30)]
    first, again = plant(answers, config(answers=20)), plant(answers, config(answers=20))
    assert first == again
    assert len(first) == 20
    assert plant(answers, config(answers=20, seed=1)) != first


def test_answers_without_a_number_are_passed_over_and_too_few_are_refused() -> None:
    answers = [answer("none"), answer("one 1"), answer("two 2")]
    assert len(plant(answers, config(answers=2))) == 2
    with pytest.raises(ConfigError, match="2 answers hold a number, answers asks for 3"):
        plant(answers, config(answers=3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPair]:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    served = ServedPair(folder, free_port())
    served.start()
    served.wait_until_ready()
    yield served
    served.kill()


def test_the_job_measures_both_tables_and_leaves_them_in_its_folder(
    pair: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"service_url={pair.url}",
        f"data.source={pair.folder / 'held_out.jsonl'}",
        "answers=3",
    ]
    assert main(["credit", "arithmetic_credit", *overrides, "policy=null"]) == 0
    result = json.loads((tmp_path / "run" / "credit.json").read_text())["result"]
    assert set(result["localisation"]) == {"sft_logprob", "reward", "centred"}
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in result["localisation"].values())
    assert result["ranking"] is None
    assert "AUROC of the corrupted digit" in capsys.readouterr().err
