"""The credit job: where an error is planted, which tokens it stands against, and the job over a real service."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reward import Client
from dense_reward_trainer.cli import main
from dense_reward_trainer.corruption import Corruption, number_corruption
from dense_reward_trainer.credit import SIGNALS, Planted, Sums, groups, plant, rank
from dense_reward_trainer.credit_config import CreditConfig
from dense_reward_trainer.data import DataSource, Demonstration, Message, load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.policy import load_policy
from dense_reward_trainer.rollout import Sampling, sample
from dense_reward_trainer.token_rewards import ServiceAddress, pinned_pair
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


def credit(pair: ServedPair, run: Path, *overrides: str) -> int:
    """The command's exit code; without a policy where no override gives one."""
    data = [f"data.source={pair.folder / 'held_out.jsonl'}", "answers=3", "policy=null"]
    return main(["credit", "arithmetic_credit", f"output_dir={run}", f"service_url={pair.url}", *data, *overrides])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_without_a_policy_the_job_measures_planted_errors_and_leaves_the_table_in_its_folder(
    pair: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert credit(pair, tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "credit.json").read_text())["result"]
    assert set(result["localisation"]) == {"sft_logprob", "reward", "centred"}
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in result["localisation"].values())
    assert result["ranking"] is None
    said = capsys.readouterr().err
    assert f"waiting for {pair.url}, up to 300 s" in said
    assert "AUROC of the corrupted digit" in said


def test_right_and_wrong_samples_are_told_apart_and_summed_as_the_service_pays_them(
    pair: ServedPair, tmp_path: Path
) -> None:
    """Nothing that random weights say is right, so a text of even length shall be."""
    settings = config(output_dir=tmp_path, samples=60, max_new_tokens=40, service_request_tokens=200)
    checkpoint = load_policy(pair.folder / "sft", precision="float32", device="cpu")
    demonstrations = load(DataSource(source=str(pair.folder / "held_out.jsonl"))).demonstrations
    with pinned_pair(ServiceAddress.of(pair.url, settings), said_to_nobody) as pinned:
        sums = rank(pinned, checkpoint, demonstrations, settings, report=said_to_nobody, is_right=is_even)

    each = -(-60 // len(demonstrations))
    prompts = [checkpoint.encoder.prompt(one.messages[0].content) for one in demonstrations]
    rollouts = sample(checkpoint.policy, prompts, Sampling(40, each, batch_size=256), seed=0)[:60]
    expected: dict[bool, list[float]] = {True: [], False: []}
    with Client(pair.url) as client:
        for rollout in rollouts:
            body = [int(i) for i in rollout.response_T[: len(rollout.response_T) - rollout.finished]]
            right = rollout.finished and len(checkpoint.encoder.tokenizer.text_and_spans(body)[0]) % 2 == 0
            scored = client.score_ids(rollout.prompt_P, [rollout.response_T]).results[0]
            assert scored.reward is not None
            expected[right].append(float(scored.reward.sum()))
    assert sums.counts == (len(expected[True]), len(expected[False]))
    assert min(sums.counts) > 0
    assert sums.right["reward"] == pytest.approx(expected[True], abs=1e-3)
    assert sums.wrong["reward"] == pytest.approx(expected[False], abs=1e-3)
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in sums.intervals(0).values())


def is_even(_: Demonstration, text: str) -> bool:
    return len(text) % 2 == 0


def said_to_nobody(_: str) -> None:
    """A report that nobody reads."""


@pytest.mark.parametrize(("right", "wrong"), [(2, 0), (0, 2)])
def test_samples_that_are_all_right_or_all_wrong_cannot_be_ranked(right: int, wrong: int) -> None:
    sums = Sums({name: [1.0] * right for name in SIGNALS}, {name: [1.0] * wrong for name in SIGNALS})
    with pytest.raises(ConfigError, match=f"{right} samples are right and {wrong} are wrong, .* policy=null"):
        sums.intervals(0)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["policy={sft}", "samples=4", "max_new_tokens=8"], "0 samples are right and 4 are wrong"),
        (["policy={sft}", "samples=4", "max_new_tokens=90"], "the reward service takes 96: lower max_new_tokens"),
        (["policy=missing"], "no such checkpoint folder"),
        (["service_pair=other"], "'other' does not name one pair"),
        (["service_url=nonsense"], "service_url: .* has no http"),
        (["service_url=http://127.0.0.1:9", "service_patience_s=0.1"], "cannot be used: gave up after 1 attempts"),
        (["data.source=missing.jsonl"], "there is no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    pair: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], complaint: str
) -> None:
    chosen = [override.format(sft=pair.folder / "sft") for override in overrides]
    assert credit(pair, tmp_path / "run", *chosen) == 2
    last = last_line(capsys)
    assert last.startswith("error: ")
    assert re.search(complaint, last), last
    assert not (tmp_path / "run" / "credit.json").exists()
