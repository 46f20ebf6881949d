"""The judge job against a real HTTP server with deterministic judges: balance, length control, faults, resuming."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dense_reward_trainer.cli import main

from bench.evaluation.scripted_judge import DRIP, ScriptedJudge

COUNT = 40


def first(a: str, b: str) -> str:
    return "My verdict: [[A]]"


def longer(a: str, b: str) -> str:
    return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"


def good(a: str, b: str) -> str:
    return {(True, False): "[[A]]", (False, True): "[[B]]"}.get(("good" in a, "good" in b), "[[C]]")


def files(folder: Path, answer: Any) -> list[str]:  # noqa: ANN401 - a function of the number
    questions = [{"conversations": [f"question {i}?"], "source": "ours"} for i in range(COUNT)]
    (folder / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, text in {"sft": lambda i: "plain " * 5, "dpr": answer}.items():
        rows = [
            {"messages": [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": text(i)}]}
            for i in range(COUNT)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = f"answers={{sft: {folder / 'sft.jsonl'}, dpr: {folder / 'dpr.jsonl'}}}"
    return ["judge", "judge_lima", f"output_dir={folder / 'run'}", f"questions={folder / 'test.jsonl'}", answers]


def judged(arguments: list[str], url: str, *more: str) -> dict[str, Any]:
    judges = f"judges={{one: {{url: '{url}', model: scripted, retries: 2}}}}"
    assert main([*arguments, judges, *more]) == 0
    folder = Path(arguments[2].partition("=")[2])
    row: dict[str, Any] = json.loads((folder / "win_rates.json").read_text())["rows"][0]
    return row


def test_a_judge_that_prefers_what_it_sees_first_comes_out_as_half(tmp_path: Path) -> None:
    with ScriptedJudge(first) as judge:
        row = judged(files(tmp_path, lambda i: "other"), judge.url)
    assert row["win_rate"]["value"] == 0.5
    assert row["ties"] == COUNT
    assert row["shown_first_wins"] == 1.0
    assert len(judge.asked) == len(set(judge.asked)) == 2 * COUNT


def test_a_known_win_rate_is_recovered_within_its_interval(tmp_path: Path) -> None:
    with ScriptedJudge(good) as judge:
        row = judged(
            files(tmp_path, lambda i: "good answer" if i % 4 else "a bad good-bye".replace("good", "")), judge.url
        )
    assert row["win_rate"]["value"] == pytest.approx(0.75 + 0.25 / 2)
    assert row["win_rate"]["low"] < 0.875 < row["win_rate"]["high"]
    assert (row["policy_wins"], row["ties"]) == (30, 10)


def test_length_control_corrects_a_judge_that_loves_length(tmp_path: Path) -> None:
    # A fifth is shorter than the baseline: without any, length and the policy could not be distinguished.
    with ScriptedJudge(longer) as judge:
        row = judged(files(tmp_path, lambda i: "x" * (50 if i % 5 else 10)), judge.url)
    assert row["win_rate"]["value"] == 0.8
    assert row["length_controlled"]["value"] == pytest.approx(0.5, abs=0.1)


def test_faults_of_the_server_are_tried_again_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedJudge(good, faults=(429, 503, 200)) as judge:
        judged(files(tmp_path, lambda i: "good"), judge.url)
    said = capsys.readouterr().err
    assert "HTTP 429" in said
    assert "HTTP 503" in said
    assert "no chat completion: " in said
    assert len(judge.answered) == 2 * COUNT


def test_what_is_no_reply_is_tried_again_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rubbish = (b"<html>busy</html>", b"", b'{"error": "overloaded"}', b'{"choices": []}', b"7", b"[" * 100_000)
    with ScriptedJudge(good, faults=rubbish) as judge:
        row = judged(files(tmp_path, lambda i: "good"), judge.url, "judges.one.concurrency=1", "judges.one.retries=6")
    assert row["win_rate"]["value"] == 1.0
    assert "no chat completion: '<html>busy</html>'" in capsys.readouterr().err
    assert len(judge.answered) == 2 * COUNT


def test_a_reply_that_drips_is_given_up_after_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedJudge(good, faults=(DRIP,)) as judge:
        judged(files(tmp_path, lambda i: "good"), judge.url, "judges.one.timeout_s=1")
    assert "not complete after 1 s" in capsys.readouterr().err
    assert len(judge.answered) == 2 * COUNT


@pytest.mark.parametrize(
    "more",
    [
        b'"usage": "none"',
        b'"usage": {"total_tokens": "many"}',
        b'"usage": {"total_tokens": 1e999}',
    ],
)
def test_odd_values_beside_the_verdict_change_nothing(tmp_path: Path, more: bytes) -> None:
    odd = b'{"choices": [{"message": {"content": "[[C]]"}}], ' + more + b"}"
    arguments = files(tmp_path, lambda i: "good")
    with ScriptedJudge(good, faults=(odd,)) as judge:
        row = judged(arguments, judge.url, "limit=2", "judges.one.concurrency=1")
        assert row == judged(arguments, judge.url, "limit=2")
    assert row["win_rate"]["value"] == pytest.approx(7 / 8)
    assert len(judge.asked) == 3


def test_replies_without_a_verdict_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedJudge(lambda a, b: "no idea" if "plain" in a and "odd" in b else good(a, b)) as judge:
        row = judged(files(tmp_path, lambda i: "odd good" if i < 3 else "good"), judge.url)
    assert row["unreadable"] == 3
    assert row["win_rate"]["value"] == 1.0
    assert "3 of 80 replies hold no verdict" in capsys.readouterr().err


def test_a_finished_run_asks_nothing_and_an_estimate_neither(tmp_path: Path) -> None:
    with ScriptedJudge(good) as judge:
        arguments = files(tmp_path, lambda i: "good")
        judges = f"judges={{one: {{url: '{judge.url}', model: scripted, input_price: 1}}}}"
        assert main([*arguments, judges, "estimate_only=true"]) == 0
        assert not judge.asked
        before = judged(arguments, judge.url)
        assert judged(arguments, judge.url) == before
        assert len(judge.asked) == 2 * COUNT


def test_the_prompts_are_written_before_there_are_answers_and_a_judge_is_chosen_later(tmp_path: Path) -> None:
    arguments = files(tmp_path, lambda i: "good")
    assert main(arguments[:-1]) == 0
    assert len((tmp_path / "run" / "prompts" / "turn_1.jsonl").read_text().splitlines()) == COUNT
    with ScriptedJudge(good) as judge:
        assert judged(arguments, judge.url)["win_rate"]["value"] == 1.0


def test_a_damaged_reply_is_named_and_asked_for_again_once_it_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, kept = files(tmp_path, lambda i: "good"), tmp_path / "run" / "replies_one.jsonl"
    with ScriptedJudge(good) as judge:
        before = judged(arguments, judge.url)
        lines = kept.read_text().splitlines(keepends=True)
        kept.write_text("".join([*lines[:2], '{"key": "a", "reply": {"choices": []}}\n', *lines[3:]]))
        judges = f"judges={{one: {{url: '{judge.url}', model: scripted, retries: 2}}}}"
        assert main([*arguments, judges]) == 2
        assert f"{kept}:3 is damaged: delete this line" in capsys.readouterr().err
        kept.write_text("".join([*lines[:2], *lines[3:]]))
        assert judged(arguments, judge.url) == before
    assert len(judge.asked) == 2 * COUNT + 1


def test_half_of_a_surrogate_pair_in_a_reply_does_not_end_the_run(tmp_path: Path) -> None:
    with ScriptedJudge(lambda a, b: "\ud800 " + good(a, b)) as judge:
        row = judged(files(tmp_path, lambda i: "good"), judge.url)
    assert row["win_rate"]["value"] == 1.0
    assert row["win_rate"]["low"] == pytest.approx(0.05 ** (1 / COUNT)), "what was not seen is allowed for"


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_twice_for_what_was_answered(tmp_path: Path) -> None:
    arguments = files(tmp_path, lambda i: f"good {i}")
    with ScriptedJudge(good, hold_after=20) as judge:
        judges = f"judges={{one: {{url: '{judge.url}', model: scripted, concurrency: 1}}}}"
        job = subprocess.Popen([sys.executable, "-m", "dense_reward_trainer.cli", *arguments, judges])
        assert judge.held.wait(120)
        job.send_signal(signal.SIGKILL)
        job.wait()
        answered = list(judge.answered)
    with (tmp_path / "run" / "replies_one.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    with ScriptedJudge(good) as second:
        row = judged(arguments, second.url)
    assert len(answered) == 20
    assert len(second.asked) == 2 * COUNT - 20
    assert not set(answered) & set(second.asked)
    assert row["win_rate"]["value"] == 1.0
