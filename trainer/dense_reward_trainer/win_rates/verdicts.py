"""What a judge is asked about two answers, and what its reply means to the benchmark's own code."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dense_reward_trainer.configs.judge import JudgePrompt, PromptName
from dense_reward_trainer.win_rates.benchmarks import Benchmark, Question, Turns
from dense_reward_trainer.win_rates.prompts import own_prompt

Messages = list[dict[str, str]]
ARENA_HARD_STRONG_WEIGHT = 3  # show_result.py counts >> three times
_ARENA_HARD = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
_ARENA_HARD_SCORES = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "A<B": 0.0, "A<<B": 0.0}
_ARENA_HARD_SCORES |= {"B>>A": 0.0, "B>A": 0.0, "B=A": 0.5, "B<A": 1.0, "B<<A": 1.0}
_MT_BENCH_SCORES = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
NO_PROMPTS: Mapping[PromptName, JudgePrompt] = {}
_PLACE = re.compile(r"\{(question|answer_a|answer_b|question_1|question_2|answer_[ab]_[12])\}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`score`: 1 if the answer that was shown first is better, 0 if the second is, 0.5 for a tie."""

    score: float
    weight: int = 1
    label: str = ""


def judge_messages(
    benchmark: Benchmark,
    question: Question,
    turn: int,
    first: Turns,
    second: Turns,
    *,
    prompts: Mapping[PromptName, JudgePrompt] = NO_PROMPTS,
) -> Messages:
    """The prompt about two answers: that of `prompts`, else our own."""
    name: PromptName = "first_turn"
    if turn == 1:
        name = "second_turn"
        values = {"question_1": question.turns[0], "question_2": question.turns[1]}
        values |= {"answer_a_1": first[0], "answer_a_2": first[1], "answer_b_1": second[0], "answer_b_2": second[1]}
    else:
        if benchmark == "arena_hard" and question.category == "creative_writing":
            name = "creative_writing"
        values = {"question": question.turns[0], "answer_a": first[0], "answer_b": second[0]}
    # In one pass: a question or an answer can itself hold {answer_b}.
    prompt = prompts.get(name) or own_prompt(benchmark, name)
    text = _PLACE.sub(lambda place: values.get(place[1], place[0]), prompt.user)
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]


def request_options(benchmark: Benchmark) -> dict[str, Any]:
    """AlpacaEval 2 weighs by the probabilities of the first token; the others read the text."""
    return {"logprobs": True, "top_logprobs": 5} if benchmark == "alpaca_eval" else {}


def verdict_of(benchmark: Benchmark, choice: Mapping[str, Any]) -> Verdict | None:
    """The verdict in one choice of a chat completion; None if there is none in it."""
    text = str((choice.get("message") or {}).get("content") or "")
    if benchmark == "alpaca_eval":
        return _alpaca_eval(text, _first_token(choice))
    if benchmark == "arena_hard":
        return _arena_hard(text)
    return next((Verdict(score, label=mark) for mark, score in _MT_BENCH_SCORES.items() if mark in text), None)


def _first_token(choice: Mapping[str, Any]) -> dict[str, float]:
    """Probabilities of the likeliest first tokens; empty if the server sends none, or sends them in another form."""
    try:
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {str(top["token"]): math.exp(top["logprob"]) for top in tops}
    except (KeyError, IndexError, TypeError, OverflowError):
        return {}
    return found if all(math.isfinite(one) for one in found.values()) else {}


def _alpaca_eval(text: str, probabilities: Mapping[str, float]) -> Verdict | None:
    """p(m) / (p(m) + p(M)) as alpaca_eval's logprob_parser; without probabilities, the text."""
    m, other = probabilities.get("m", 0.0), probabilities.get("M", 0.0)
    if m + other > 0:
        return Verdict(m / (m + other), label="m" if m >= other else "M")
    word = text.strip()
    return Verdict(1.0 if word == "m" else 0.0, label=word) if word in ("m", "M") else None


def _arena_hard(text: str) -> Verdict | None:
    """The last verdict in the text, as get_score of gen_judgment.py."""
    for pattern in _ARENA_HARD:
        marks = pattern.findall(text.upper())
        if marks:
            label = marks[-1]
            if label not in _ARENA_HARD_SCORES:
                return None
            strong = ">>" in label or "<<" in label
            return Verdict(_ARENA_HARD_SCORES[label], ARENA_HARD_STRONG_WEIGHT if strong else 1, label)
    return None
