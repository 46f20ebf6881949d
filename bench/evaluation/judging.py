"""The judge job against a scripted judge whose verdicts are known, killed by SIGKILL, and against a real server."""

import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from dense_reward_trainer.cli import main
from dense_reward_trainer.runs.local_service import free_port

from bench.circumstances import Json
from bench.evaluation.scripted_judge import ScriptedJudge

PROGRAM = [sys.executable, "-m", "dense_reward_trainer.cli"]
QUESTIONS, SETS = 200, 20
SHARES = {"win": 0.55, "tie": 0.1, "loss": 0.35}
TRUE_RATE = SHARES["win"] + SHARES["tie"] / 2
KILLS = (40, 120, 260)
"""Replies of the judge after which it holds the next ones, and the job is killed."""
CONCURRENCY = 8
SERVED_QUESTIONS = 15
STARTING_S = 120.0


def scripted() -> tuple[Json, Json]:
    """Known win rates and their intervals, the orders, and what a killed job asks again."""
    rng = random.Random(0)
    sets = [_one_set(rng) for _ in range(SETS)]
    again, in_flight = _killed(rng)
    covered = sum(bool(one["interval_has_true_rate"]) for one in sets)
    figures: Json = {
        "judge_win_rate_error": max(float(str(one["error"])) for one in sets),
        "judge_intervals_with_true_rate": f"{covered} of {SETS}",
        "judge_policy_shown_first": sorted({float(str(one["policy_shown_first"])) for one in sets}),
        "asked_twice": again,
        "asked_twice_on_its_way": in_flight,
    }
    return figures, {"true_rate": TRUE_RATE, "questions": QUESTIONS, "sets": sets, "kills_after": list(KILLS)}


def _one_set(rng: random.Random) -> Json:
    """Verdicts are drawn with known chances; the error is that of the win rate against the drawn verdicts."""
    outcomes = rng.choices(list(SHARES), list(SHARES.values()), k=QUESTIONS)
    known = sum({"win": 1.0, "tie": 0.5, "loss": 0.0}[one] for one in outcomes) / QUESTIONS
    with tempfile.TemporaryDirectory() as folder, ScriptedJudge(verdict) as judge:
        with redirect_stderr(io.StringIO()):
            assert main(judge_job(Path(folder), outcomes, judge.url)) == 0
        found = win_rate_of(Path(folder))
        first = [text.index("policy") < text.index("baseline") for text in map(_answers_of, judge.asked)]
    assert len(judge.asked) == len(set(judge.asked)) == 2 * QUESTIONS
    return {
        "known": known,
        **found,
        "error": abs(found["value"] - known),
        "interval_has_true_rate": found["low"] <= TRUE_RATE <= found["high"],
        "policy_shown_first": sum(first) / len(first),
    }


def _answers_of(text: str) -> str:
    return text[text.rindex("# Answer A") :]


def verdict(a: str, b: str) -> str:
    """The verdict that the policy's answer names, whichever place it has."""
    outcome = (a if a.startswith("policy") else b).split()[1]
    if outcome == "tie":
        return "My verdict: [[C]]"
    return "My verdict: [[A]]" if (outcome == "win") == a.startswith("policy") else "My verdict: [[B]]"


def judge_job(folder: Path, outcomes: Sequence[str], url: str, *more: str) -> list[str]:
    """The arguments of a judge job, and its files: the policy's answers name their outcome."""
    write(
        folder / "test.jsonl", [{"conversations": [f"question {i}?"], "source": "ours"} for i in range(len(outcomes))]
    )
    for name, text in {"sft": lambda i: f"baseline {i}", "dpr": lambda i: f"policy {outcomes[i]} {i}"}.items():
        write(folder / f"{name}.jsonl", [_answered(i, text) for i in range(len(outcomes))])
    judges = f"judges={{judge: {{url: '{url}', model: scripted, concurrency: {CONCURRENCY}}}}}"
    answers = f"answers={{sft: {folder / 'sft.jsonl'}, dpr: {folder / 'dpr.jsonl'}}}"
    files = [f"questions={folder / 'test.jsonl'}", f"output_dir={folder / 'run'}"]
    return ["judge", "judge_lima", *files, answers, judges, *more]


def _answered(number: int, text: Callable[[int], str]) -> Json:
    turns = [("user", f"question {number}?"), ("assistant", text(number))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, rows: Sequence[Json]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def win_rate_of(folder: Path) -> dict[str, float]:
    row: dict[str, dict[str, float]] = json.loads((folder / "run" / "win_rates.json").read_text())["rows"][0]
    return row["win_rate"]


def _killed(rng: random.Random) -> tuple[int, int]:
    """Requests that were asked again although their replies had arrived, and those that were on their way at a kill."""
    outcomes = rng.choices(list(SHARES), list(SHARES.values()), k=QUESTIONS)
    answered: list[str] = []
    twice, on_their_way = 0, 0
    with tempfile.TemporaryDirectory() as name:
        for held_after in (*KILLS, None):
            already = None if held_after is None else held_after - len(answered)
            with ScriptedJudge(verdict, hold_after=already) as judge:
                job = subprocess.Popen(
                    [*PROGRAM, *judge_job(Path(name), outcomes, judge.url)], stderr=subprocess.DEVNULL
                )
                if held_after is None:
                    assert job.wait() == 0
                else:
                    assert judge.held.wait(STARTING_S)
                    time.sleep(1)  # so that the replies that were given have arrived
                    job.send_signal(signal.SIGKILL)
                    job.wait()
                    on_their_way += len(judge.asked) - len(judge.answered)
                twice += len(set(judge.asked) & set(answered))
                answered += judge.answered
        assert len(set(answered)) == len(answered) == 2 * QUESTIONS
    return twice, on_their_way


def real_server() -> tuple[Json, Json]:
    """`transformers serve` with the demo's SFT model as the judge: its verdicts mean nothing, the loop is real."""
    outcomes = ["win"] * SERVED_QUESTIONS
    with tempfile.TemporaryDirectory() as name, openai_server(Path("runs/demo/checkpoints/sft")) as (url, model, log):
        folder = Path(name)
        prompt = "prompts={first_turn: {system: Add., user: 'Add 12 and 34. {question} {answer_a} {answer_b}'}}"
        judges = f"judges={{judge: {{url: '{url}', model: '{model}', max_tokens: 16, concurrency: 2}}}}"
        arguments = judge_job(folder, outcomes, url, prompt)
        arguments[-2] = judges
        subprocess.run([*PROGRAM, *arguments], check=True)
        replies = [json.loads(line) for line in (folder / "run" / "replies_judge.jsonl").read_text().splitlines()]
        asked = _posts(log)
        subprocess.run([*PROGRAM, *arguments], check=True)
        row = json.loads((folder / "run" / "win_rates.json").read_text())["rows"][0]
        figures: Json = {
            "judge_server_replies": len(replies),
            "judge_server_requests": asked,
            "judge_server_asked_by_a_second_start": _posts(log) - asked,
            "judge_server_questions_without_verdict": row["unreadable"],
        }
        texts = [one["reply"]["choices"][0]["message"]["content"] for one in replies[:3]]
        return figures, {"server": "transformers serve", "some_replies": texts}


def _posts(log: Path) -> int:
    return len(re.findall(r'"POST /v1/chat/completions HTTP/1.1" 200', log.read_text()))


@contextmanager
def openai_server(checkpoint: Path) -> Iterator[tuple[str, str, Path]]:
    """transformers' own server on a CPU: its URL up to /v1, the model's name there, and its log."""
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(checkpoint.resolve()), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.NamedTemporaryFile("wb", suffix=".log") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + STARTING_S
            while "running on" not in Path(log.name).read_text():
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"transformers serve did not start: {Path(log.name).read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(checkpoint.resolve()), Path(log.name)
        finally:
            server.terminate()
            server.wait()
