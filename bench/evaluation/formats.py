"""The benchmarks' formats, there and back: by their own programs where a package has them, else by a documented row.

`make evaluation` installs alpaca_eval and FastChat beside the environment. Arena-Hard has no package: its own program
runs if ARENA_HARD_AUTO names a clone of lmarena/arena-hard-auto. Of the others no program reads these files; their rows
are those of their authors' documents and data cards.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_reward_trainer.benchmarks.prm_bench import read_prm_bench
from dense_reward_trainer.benchmarks.reward_bench_2 import read_reward_bench_2
from dense_reward_trainer.configs.judge import JudgeConfig
from dense_reward_trainer.data.process_labels import read_solutions
from dense_reward_trainer.win_rates.benchmarks import Benchmark, Turns, read_answers, read_questions, write_answers
from dense_reward_trainer.win_rates.games import Played, games, played, write_judgements

from bench.circumstances import Json
from bench.evaluation.judging import write

PACKAGES = Path(".venv-evaluation/formats")
ARENA_HARD = Path(os.environ["ARENA_HARD_AUTO"]) if os.environ.get("ARENA_HARD_AUTO") else None
QUESTIONS = 30
OUTCOMES = ("win", "win", "tie", "loss", "win")
LABELS: Mapping[Benchmark, Mapping[str, tuple[str, str]]] = {
    # outcome -> what the judge says with the baseline first, and with the policy first
    "alpaca_eval": {"win": ("M", "m"), "tie": ("m", "m"), "loss": ("m", "M")},
    "arena_hard": {"win": ("[[B>>A]]", "[[A>B]]"), "tie": ("[[A=B]]", "[[A=B]]"), "loss": ("[[A>B]]", "[[B>A]]")},
    "mt_bench": {"win": ("[[B]]", "[[A]]"), "tie": ("[[C]]", "[[C]]"), "loss": ("[[A]]", "[[B]]")},
    "lima": {"win": ("[[B]]", "[[A]]"), "tie": ("[[C]]", "[[C]]"), "loss": ("[[A]]", "[[B]]")},
}
ROWS: Mapping[str, Any] = {
    "alpaca_eval": lambda i: {"dataset": "helpful_base", "instruction": f"Why {i}?", "output": "", "generator": "x"},
    "arena_hard": lambda i: {"uid": f"{i}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Why {i}?"},
    "mt_bench": lambda i: {"question_id": 80 + i, "category": "writing", "turns": [f"Why {i}?", "And then?"]},
    "lima": lambda i: {"conversations": [f"Why {i}?"], "source": "authors"},
}
READ: Mapping[str, tuple[Callable[[Path], Sequence[object]], Json]] = {
    "process_bench": (read_solutions, {"id": "gsm8k-0", "problem": "P", "steps": ["a", "b"], "label": 1}),
    "prm800k": (
        read_solutions,
        {
            "question": {"problem": "P"},
            "label": {
                "steps": [{"completions": [{"text": "a", "rating": -1}], "chosen_completion": 0}],
                "finish_reason": "found_error",
            },
        },
    ),
    "prm_bench": (
        read_prm_bench,
        {
            "original_question": "P",
            "modified_question": "Q",
            "original_process": ["1. a"],
            "modified_process": ["1. a", "2. b"],
            "modified_steps": [2],
            "error_steps": [2],
            "reason": "",
            "idx": "circular_0",
            "question": "P",
            "classification": "circular",
        },
    ),
    "reward_bench_2": (
        read_reward_bench_2,
        {
            "id": "7",
            "prompt": "Say hello.",
            "chosen": ["Hello."],
            "rejected": ["Bye.", "No.", "42"],
            "num_correct": 1,
            "num_incorrect": 3,
            "total_completions": 4,
            "models": ["a", "b", "c", "d"],
            "subset": "Factuality",
            "additional_metadata": None,
        },
    ),
}


def measure() -> tuple[Json, Json]:
    """Each format with how it was checked. Raises AssertionError if a file is not read back."""
    formats: list[Json] = []
    with tempfile.TemporaryDirectory() as name:
        formats += [{"name": one, "checked": _win_rates(one, Path(name) / one)} for one in LABELS]
        for benchmark, (read, row) in READ.items():
            write(Path(name) / f"{benchmark}.jsonl", [row, {**row, "id": "8", "idx": "circular_1"}])
            assert len(read(Path(name) / f"{benchmark}.jsonl")) == 2
            formats.append({"name": benchmark, "checked": "rows as its authors document them are read"})
    return {"formats": formats}, {}


def _win_rates(benchmark: Benchmark, folder: Path) -> str:
    """Answers and verdicts written and read back; where there is a program of the benchmark, its win rate is ours."""
    folder.mkdir()
    write(folder / "questions.jsonl", [ROWS[benchmark](number) for number in range(QUESTIONS)])
    questions = read_questions(benchmark, folder / "questions.jsonl")
    turns = {name: [(f"{name}.", "Then.")[: len(one.turns)] for one in questions] for name in ("sft", "dpr")}
    answers: dict[str, Sequence[Turns]] = dict(turns)
    for name, given in turns.items():
        write_answers(benchmark, folder / benchmark, name, questions, answers[name])
        (written,) = (folder / benchmark).rglob(f"{name}.json*")
        assert read_answers(written, questions) == given
    config = JudgeConfig.model_validate(
        {
            "output_dir": str(folder),
            "benchmark": benchmark,
            "questions": str(folder / "questions.jsonl"),
            "judges": {"judge": {"url": "http://127.0.0.1/v1", "model": "scripted"}},
        }
    )
    round_ = games(config, config.judges["judge"], questions, answers)
    kept = {}
    for game in round_:
        said = LABELS[benchmark][OUTCOMES[game.question % len(OUTCOMES)]][0 if game.baseline_first else 1]
        kept[game.key] = {"reply": {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}}
    found = played(config, round_, kept)
    write_judgements(config, "judge", questions, answers, found)
    own = OWN_PROGRAMS.get(benchmark)
    if own is None or (benchmark == "arena_hard" and ARENA_HARD is None):
        return "questions and answers as its authors document them, written and read back"
    ours = _share(found)
    name, theirs = own(folder / benchmark)
    assert abs(ours - theirs) < 1e-4, (benchmark, ours, theirs)
    return f"{name} reads the verdicts: its win rate is ours, {ours:.3f}"


def _share(found: Sequence[Played]) -> float:
    totals, weights = zip(*(one.weighted for one in found), strict=True)
    return float(sum(totals) / sum(weights))


def _alpaca_eval(folder: Path) -> tuple[str, float]:
    (file,) = (folder / "annotations").rglob("dpr.jsonl")
    program = "import json, sys, alpaca_eval.metrics as m; rows = [json.loads(one) for one in open(sys.argv[1])]; "
    said = _said("-c", program + "print(m.get_winrate(rows)['win_rate'])", str(file))
    return "alpaca_eval 0.6.6 (get_winrate)", float(said.split()[-1]) / 100


def _arena_hard(folder: Path) -> tuple[str, float]:
    """Its leaderboard is a mean over 100 resamples of the battles; the mean of the battles themselves is exact."""
    assert ARENA_HARD is not None
    data = folder / "data" / "arena-hard-v2.0"
    shutil.copytree(folder / "model_judgment", data / "model_judgment")
    program = (
        "import show_result as s; battles = s.load_judgments(['judge'], 'arena-hard-v2.0'); "
        "s.print_leaderboard(battles, 'hard_prompt'); print('mean', battles.scores.astype(float).mean())"
    )
    shown = _said("-c", program, packages=ARENA_HARD, cwd=folder)
    row = re.search(r"^\d+ +dpr +([\d.]+)", shown, re.MULTILINE)
    mean = float(shown.split()[-1])
    assert row is not None, shown
    assert abs(float(row[1]) / 100 - mean) < 0.05, shown
    program_sha256 = hashlib.sha256((ARENA_HARD / "show_result.py").read_bytes()).hexdigest()
    return f"arena-hard-auto (show_result.py, SHA-256 {program_sha256[:12]})", mean


def _fastchat(folder: Path) -> tuple[str, float]:
    """Its adjusted win rate, in which a tie is half a win."""
    (file,) = (folder / "model_judgment").rglob("*_pair.jsonl")
    options = ["--mode", "pairwise-baseline", "--baseline-model", "sft", "--input-file", str(file)]
    shown = _said("-m", "fastchat.llm_judge.show_result", *options)
    row = re.search(r"^dpr .*", shown, re.MULTILINE)
    assert row is not None, shown
    return "FastChat 0.2.36 (show_result)", float(row[0].split()[-1])


def _said(*arguments: str, packages: Path = PACKAGES, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(packages.absolute())}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd).stdout


OWN_PROGRAMS: Mapping[Benchmark, Callable[[Path], tuple[str, float]]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _fastchat,
}
