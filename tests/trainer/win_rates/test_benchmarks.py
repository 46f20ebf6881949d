"""The benchmarks' own layouts, there and back, and what their own code reads of a reply."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from dense_reward_trainer.configs.judge import PLACES, JudgePrompt, PromptName
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.win_rates.benchmarks import Benchmark, read_answers, read_questions, write_answers
from dense_reward_trainer.win_rates.contamination import overlaps
from dense_reward_trainer.win_rates.prompts import own_prompt
from dense_reward_trainer.win_rates.statistics import cohens_kappa, length_controlled, win_rate
from dense_reward_trainer.win_rates.verdicts import judge_messages, verdict_of

ROWS: dict[Benchmark, dict[str, Any]] = {
    "alpaca_eval": {"dataset": "helpful_base", "instruction": "Why?", "output": "o", "generator": "text_davinci_003"},
    "arena_hard": {"uid": "0a", "category": "hard_prompt", "subcategory": "coding", "prompt": "Why?"},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Why?", "And then?"]},
    "lima": {"conversations": ["Why?"], "source": "authors"},
}


@pytest.mark.parametrize("benchmark", ROWS)
def test_answers_written_for_a_benchmark_are_read_back(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[benchmark]) + "\n")
    questions = read_questions(benchmark, tmp_path / "q.jsonl")
    answers = [("So.", "Then.")[: len(questions[0].turns)]]
    write_answers(benchmark, tmp_path, "dpr", questions, answers)
    (written,) = tmp_path.rglob("dpr.json*")
    assert read_answers(written, questions) == answers


@pytest.mark.parametrize(
    ("benchmark", "rows", "complaint"),
    [
        ("alpaca_eval", [{"instruction": None}], r"row 1 is no question of alpaca_eval \(its turns are no texts"),
        ("mt_bench", [{"question_id": 1, "category": "c", "turns": []}], "its turns are no texts"),
        ("mt_bench", [{"question_id": 1, "category": "c", "turns": "Why?"}], "its turns are no texts"),
        ("mt_bench", [{"question_id": 1, "category": "c", "turns": ["Why?"]}] * 2, "several questions of one id"),
        ("lima", [{"source": "authors"}], "missing: 'conversations'"),
    ],
)
def test_rows_that_are_no_questions_are_refused(
    benchmark: Benchmark, rows: list[object], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=complaint):
        read_questions(benchmark, tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "output": None},
        {"question_id": "0", "choices": [{"turns": []}]},
        {"uid": "0", "messages": [{"content": {"answer": 7}}]},
        {"conversations": ["Why?", None]},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}]},
    ],
)
def test_null_is_no_answer(row: object, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS["lima"]) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="row 1 is no answer of a known layout"):
        read_answers(tmp_path / "a.jsonl", read_questions("lima", tmp_path / "q.jsonl"))


def test_old_arena_hard_questions_are_read(tmp_path: Path) -> None:
    row = {"question_id": "f", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Why?"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert read_questions("arena_hard", tmp_path / "q.jsonl")[0].turns == ("Why?",)


@pytest.mark.parametrize("benchmark", ROWS)
def test_braces_in_an_answer_stay_as_they_are(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[benchmark]) + "\n")
    (question,) = read_questions(benchmark, tmp_path / "q.jsonl")
    text = judge_messages(benchmark, question, 0, ("{answer_b}", "x"), ("second", "y"))[1]["content"]
    assert "{answer_b}" in text
    assert text.count("second") == 1


def test_prompts_of_the_configuration_take_the_place_of_the_own(tmp_path: Path) -> None:
    text = "Q {question_2} A {answer_a_2} B {answer_b_2}"
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS["mt_bench"]) + "\n")
    (question,) = read_questions("mt_bench", tmp_path / "q.jsonl")
    prompts: dict[PromptName, JudgePrompt] = {"second_turn": JudgePrompt(system="s", user=text)}
    asked = judge_messages("mt_bench", question, 1, ("a", "b"), ("c", "d"), prompts=prompts)
    assert [one["content"] for one in asked] == ["s", "Q And then? A b B d"]
    of_first = judge_messages("mt_bench", question, 0, ("a", "b"), ("c", "d"), prompts=prompts)
    assert {"a", "b", "c", "d"} & {*of_first[1]["content"].split()} == {"a", "c"}


@pytest.mark.parametrize("benchmark", ROWS)
def test_the_own_prompts_name_verdicts_that_the_benchmark_reads(benchmark: Benchmark) -> None:
    for name in get_args(PromptName):
        prompt = own_prompt(benchmark, name)
        assert all(place in prompt.user for place in PLACES[name])
    if benchmark != "alpaca_eval":
        named = re.findall(r"\[\[[^]]*\]\]", own_prompt(benchmark, "first_turn").system)
        scores = [verdict_of(benchmark, {"message": {"content": f"So: {mark}"}}) for mark in named]
        assert {0.0, 0.5, 1.0} == {one.score for one in scores if one is not None}
        assert None not in scores


def test_verdicts_are_read_as_the_benchmarks_read_them() -> None:
    def said(text: str, **more: object) -> dict[str, Any]:
        return {"message": {"content": text}, **more}

    strong = verdict_of("arena_hard", said("[[A>B]] no: [[B>>A]]"))
    assert strong is not None
    assert (strong.score, strong.weight) == (0.0, 3)
    assert verdict_of("arena_hard", said("[[A?]]")) is None
    top = [{"token": "m", "logprob": np.log(0.6)}, {"token": "M", "logprob": np.log(0.2)}]
    weighed = verdict_of("alpaca_eval", said("m", logprobs={"content": [{"top_logprobs": top}]}))
    assert weighed is not None
    assert weighed.score == pytest.approx(0.75)
    assert verdict_of("mt_bench", said("both fail")) is None


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        "none",
        [1],
        {"content": "m"},
        {"content": [{"top_logprobs": None}]},
        {"content": [{"top_logprobs": [{"logprob": -1.0}]}]},
        {"content": [{"top_logprobs": [{"token": "M", "logprob": None}]}]},
        {"content": [{"top_logprobs": [{"token": "M", "logprob": 1e9}]}]},
        {"content": [{"top_logprobs": [{"token": "M", "logprob": float("inf")}]}]},
        {"content": [{"top_logprobs": [{"token": "M", "logprob": float("nan")}]}]},
    ],
)
def test_without_log_probs_in_the_form_of_openai_the_text_counts(logprobs: object) -> None:
    verdict = verdict_of("alpaca_eval", {"message": {"content": " m"}, "logprobs": logprobs})
    assert verdict is not None
    assert verdict.score == 1.0


def test_half_of_a_surrogate_pair_is_refused_with_the_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"conversations": ["Why \\ud800?"]}\n')
    with pytest.raises(DataError, match=r"q\.jsonl cannot be read"):
        read_questions("lima", tmp_path / "q.jsonl")


def test_equal_verdicts_leave_room_for_questions_that_were_not_asked() -> None:
    """The rule of three: after 10 wins of 10, up to 1 - 0.05^(1/10) = 26 % of other questions may be lost."""
    rate = win_rate(np.ones(10), np.full(10, 2.0), seed=0)
    assert (rate.value, rate.high) == (1.0, 1.0)
    assert rate.low == pytest.approx(0.05**0.1)
    controlled = length_controlled(np.ones(10), np.arange(10.0), np.full(10, 5.0), seed=0)
    assert controlled is not None
    assert controlled.low == pytest.approx(0.05**0.1, abs=1e-4)
    one = win_rate(np.ones(1), np.full(1, 2.0), seed=0)
    assert one.low == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5])
def test_a_score_that_is_no_share_is_refused(bad: float) -> None:
    scores_Q = np.array([bad, *[0.5] * 9])
    with pytest.raises(ValueError, match="between 0 and 1"):
        win_rate(scores_Q, np.full(10, 2.0), seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        length_controlled(scores_Q, np.arange(10.0), np.full(10, 5.0), seed=0)


def test_contamination_by_each_definition() -> None:
    long = " ".join(f"w{i}" for i in range(20))
    found = overlaps(
        [f"before {long} after", "Hello, World!", "w0 w1 w2 w3 w4 w5 w6 w7"], [long, "hello world", "w0 w1 w2 w9"]
    )
    assert [o.contaminated for o in found] == [True, True, False]
    assert (found[0].exact, found[0].share_8, found[1].exact) == (False, 1.0, True)


def test_kappa_of_a_known_table() -> None:
    """Cohen's formula by hand: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)


def test_length_control_leaves_a_preference_that_length_does_not_explain() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 150, 200).astype(float)
    scores = (rng.random(200) < 0.7).astype(float)
    found = length_controlled(scores, lengths, np.full(200, 100.0), 0)
    assert found is not None
    assert found.value == pytest.approx(scores.mean(), abs=0.04)
    assert found.low < found.value < found.high
