"""AlpacaEval 2, Arena-Hard, MT-Bench and LIMA: their questions, their answers and what their own tools read.

Layouts by the benchmarks' own code: alpaca_eval's `main.py` and annotations, arena-hard-auto's gen_answer.py and
gen_judgment.py, FastChat's llm_judge/common.py, and LIMA's test.jsonl.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dense_reward.checkpoints.atomic_file import write_whole

from dense_reward_trainer.data.sources import DataError

Benchmark = Literal["alpaca_eval", "arena_hard", "mt_bench", "lima"]
Turns = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question in one or two turns. `source`: its whole line in the benchmark's file."""

    id: str
    turns: Turns
    category: str
    source: Mapping[str, Any]


def read_questions(benchmark: Benchmark, path: Path) -> list[Question]:
    """All questions of the benchmark's own file. Raises DataError that names the line."""
    found = []
    for number, row in enumerate(read_rows(path)):
        try:
            found.append(_question(benchmark, number, row))
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path}: row {number + 1} is no question of {benchmark} ({_reason(error)})") from None
    if not found:
        raise DataError(f"{path} has no questions")
    if len({question.id for question in found}) < len(found):
        raise DataError(f"{path} has several questions of one id: answers could not be matched")
    return found


def _question(benchmark: Benchmark, number: int, row: Mapping[str, Any]) -> Question:
    if benchmark == "alpaca_eval":
        return Question(str(number), _texts([row["instruction"]]), row.get("dataset", ""), row)
    if benchmark == "lima":
        return Question(str(number), _texts([row["conversations"][0]]), row.get("source", ""), row)
    if benchmark == "mt_bench":
        return Question(str(row["question_id"]), _texts(row["turns"]), row["category"], row)
    if "uid" in row:
        return Question(row["uid"], _texts([row["prompt"]]), row["category"], row)
    turns = _texts([row["turns"][0]["content"]])
    return Question(row["question_id"], turns, row.get("category", "arena-hard-v0.1"), row)


def _texts(turns: object) -> Turns:
    """One or more texts. Raises TypeError for anything else: null is no answer, and no empty one."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise TypeError("its turns are no texts")
    return tuple(turns)


def _reason(error: Exception) -> str:
    return f"missing: {error}" if isinstance(error, KeyError) else str(error)


def read_answers(path: Path, questions: Sequence[Question]) -> list[Turns]:
    """A policy's answers, by turn, in the order of the questions: `samples.jsonl` or a benchmark's own answer file.

    Matched by the question's id where the file has ids, else by its text. Raises DataError if one has no answer.
    """
    by_key: dict[str, Turns] = {}
    in_order: list[tuple[str, Turns]] = []
    for number, row in enumerate(read_rows(path)):
        try:
            key, turns = _answer(row)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path}: row {number + 1} is no answer of a known layout ({_reason(error)})") from None
        by_key.setdefault(key, turns)
        in_order.append((key, turns))
    same_order = len(in_order) == len(questions)
    if same_order and all(key in (q.id, q.turns[0]) for (key, _), q in zip(in_order, questions, strict=True)):
        return [turns for _, turns in in_order]  # also where two questions have the same text
    if len(by_key) < len(in_order):
        raise DataError(f"{path} has several answers to one question: sample one for each prompt")
    missing = [question for question in questions if not {question.id, question.turns[0]} & by_key.keys()]
    if missing:
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(questions)} questions, such as {missing[0].id}"
        )
    return [by_key[q.turns[0]] if q.turns[0] in by_key else by_key[q.id] for q in questions]


def _answer(row: Mapping[str, Any]) -> tuple[str, Turns]:
    """The question's text or id, and the answers to its turns."""
    if "choices" in row:  # MT-Bench, Arena-Hard 0.1
        turns = row["choices"][0]["turns"]
        return str(row["question_id"]), _texts([t if isinstance(t, str) else t["content"] for t in turns])
    if "uid" in row:  # Arena-Hard 2
        content = row["messages"][-1]["content"]
        return row["uid"], _texts([content if isinstance(content, str) else content["answer"]])
    if "conversations" in row:
        return row["conversations"][0], _texts([row["conversations"][1]])
    if "output" in row:
        return row["instruction"], _texts([row["output"]])
    users = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return users[0], _texts([message["content"] for message in row["messages"] if message["role"] == "assistant"])


def prompt_lines(questions: Iterable[Question], answers: Sequence[Turns] | None = None) -> bytes:
    """The prompts as the `sample` job reads them: first turns, or second turns after a policy's first `answers`."""
    lines = []
    for number, question in enumerate(questions):
        messages = [{"role": "user", "content": question.turns[0]}]
        if answers is not None:
            messages.append({"role": "assistant", "content": answers[number][0]})
            messages.append({"role": "user", "content": question.turns[1]})
        lines.append({"messages": messages})
    return as_lines(lines)


def write_answers(
    benchmark: Benchmark, folder: Path, name: str, questions: Sequence[Question], answers: Sequence[Turns]
) -> None:
    """Writes a policy's answers where the benchmark's own tool expects them, below `folder`."""
    pairs = list(zip(questions, answers, strict=True))
    if benchmark == "alpaca_eval":
        outputs = [
            {"dataset": q.category, "instruction": q.turns[0], "output": turns[0], "generator": name}
            for q, turns in pairs
        ]
        _write(folder / "model_outputs" / f"{name}.json", json.dumps(outputs, ensure_ascii=False, indent=1).encode())
    elif benchmark == "lima":
        lines = [{**q.source, "conversations": [q.turns[0], turns[0]]} for q, turns in pairs]
        _write(folder / "model_answer" / f"{name}.jsonl", as_lines(lines))
    else:
        rows = [_answer_row(benchmark, name, q, turns) for q, turns in pairs]
        _write(folder / "model_answer" / f"{name}.jsonl", as_lines(rows))


def _answer_row(benchmark: Benchmark, name: str, question: Question, turns: Turns) -> dict[str, Any]:
    """`tstamp` is 0: the same answers give the same file."""
    answer_id = f"{name}-{question.id}"
    if "uid" in question.source:
        messages = [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": turns[0]}},
        ]
        return {"uid": question.id, "ans_id": answer_id, "model": name, "messages": messages, "tstamp": 0.0}
    texts: list[Any] = list(turns) if benchmark == "mt_bench" else [{"content": turn} for turn in turns]
    choices = [{"index": 0, "turns": texts}]
    shared = {"answer_id": answer_id, "model_id": name, "choices": choices, "tstamp": 0.0}
    return {"question_id": question.source["question_id"], **shared}


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of JSON Lines. Raises DataError if the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        rows = list(json.loads(text)) if text.lstrip().startswith("[") else [json.loads(x) for x in lines if x.strip()]
        as_lines(rows)  # half of a surrogate pair, as in "\ud800", can be neither sent nor written
        return rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON or JSON Lines: {error}") from None


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
