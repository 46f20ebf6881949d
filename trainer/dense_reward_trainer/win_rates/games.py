"""Games: a question, a policy's answer and the baseline's, in one order; from replies to the field's files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense_reward.checkpoints.atomic_file import write_whole

from dense_reward_trainer.configs.judge import JudgeConfig, JudgeOptions
from dense_reward_trainer.win_rates.benchmarks import Question, Turns, as_lines
from dense_reward_trainer.win_rates.judge import Kept, request_key
from dense_reward_trainer.win_rates.verdicts import Verdict, judge_messages, request_options, verdict_of

Answers = Mapping[str, Sequence[Turns]]


@dataclass(frozen=True, slots=True)
class Game:
    """`baseline_first`: the order. `key`: of the request. `question`: its place in the file."""

    policy: str
    question: int
    turn: int
    baseline_first: bool
    request: Mapping[str, Any]
    key: str


@dataclass(frozen=True, slots=True)
class Played:
    """Both orders of one turn. `verdicts`, `replies`: the baseline shown first, then the policy. None: no verdict."""

    policy: str
    question: int
    turn: int
    verdicts: tuple[Verdict | None, Verdict | None]
    replies: tuple[dict[str, Any], dict[str, Any]]

    @property
    def scores(self) -> tuple[float, float] | None:
        """The policy's score in each order; None unless both have a verdict, so that both orders count the same."""
        first, second = self.verdicts
        return None if first is None or second is None else (1 - first.score, second.score)

    @property
    def weighted(self) -> tuple[float, int]:
        """Sum of the policy's scores times their weights, and sum of the weights. Both orders must have a verdict."""
        first, second = self.verdicts
        assert first is not None
        assert second is not None
        total = (1 - first.score) * first.weight + second.score * second.weight
        return total, first.weight + second.weight

    @property
    def winner(self) -> str:
        """The policy, the baseline or a tie, by both orders together; error if one has no verdict."""
        if self.scores is None:
            return "error"
        total = sum(self.scores)
        return "tie" if total == 1 else "policy" if total > 1 else "baseline"


def games(config: JudgeConfig, judge: JudgeOptions, questions: Sequence[Question], answers: Answers) -> list[Game]:
    """Every game of every policy, in both orders; two of a pair follow one another."""
    found = []
    for policy in (name for name in answers if name != config.baseline):
        for index, question in enumerate(questions):
            sides = answers[config.baseline][index], answers[policy][index]
            for turn in range(len(question.turns)):
                for baseline_first in (True, False):
                    first, second = sides if baseline_first else sides[::-1]
                    request = {
                        "model": judge.model,
                        "messages": judge_messages(
                            config.benchmark, question, turn, first, second, prompts=config.prompts
                        ),
                        "max_tokens": judge.max_tokens,
                        "temperature": judge.temperature,
                        **request_options(config.benchmark),
                    }
                    found.append(Game(policy, index, turn, baseline_first, request, request_key(request)))
    return found


def played(config: JudgeConfig, pairs: Sequence[Game], kept: Kept) -> list[Played]:
    """The games with their verdicts, both orders together."""
    found = []
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        choices = [kept[game.key]["reply"]["choices"][0] for game in (one, other)]
        verdicts = verdict_of(config.benchmark, choices[0]), verdict_of(config.benchmark, choices[1])
        found.append(Played(one.policy, one.question, one.turn, verdicts, (choices[0], choices[1])))
    return found


def verdict_lines(
    config: JudgeConfig, judge: str, pairs: Sequence[Game], found: Sequence[Played]
) -> Iterator[dict[str, Any]]:
    """Each game as a line: who was shown first, the judge's label and the policy's score; null without a verdict."""
    for number, game in enumerate(pairs):
        verdict = found[number // 2].verdicts[number % 2]
        score = None if verdict is None else 1 - verdict.score if game.baseline_first else verdict.score
        first = config.baseline if game.baseline_first else game.policy
        shared = {"judge": judge, "policy": game.policy, "baseline": config.baseline, "question": game.question}
        label = None if verdict is None else verdict.label
        yield {**shared, "turn": game.turn + 1, "shown_first": first, "label": label, "score": score, "key": game.key}


def write_judgements(
    config: JudgeConfig, judge: str, questions: Sequence[Question], answers: Answers, found: Sequence[Played]
) -> None:
    """Writes the verdicts as the benchmark's own tool reads them; LIMA has none."""
    folder = config.output_dir / config.benchmark
    for policy in (name for name in answers if name != config.baseline):
        of_policy = [one for one in found if one.policy == policy]
        if config.benchmark == "alpaca_eval":
            rows = [_annotation(config, judge, questions, answers, one) for one in of_policy]
            _write(folder / "annotations" / judge / f"{policy}.jsonl", rows)
        elif config.benchmark == "arena_hard":
            rows = [_arena_hard(config, judge, questions, one) for one in of_policy]
            _write(folder / "model_judgment" / judge / f"{policy}.jsonl", rows)
    if config.benchmark == "mt_bench":
        rows = [_mt_bench(config, judge, questions, one) for one in found]
        _write(folder / "model_judgment" / f"{judge}_pair.jsonl", rows)


def _annotation(
    config: JudgeConfig, judge: str, questions: Sequence[Question], answers: Answers, one: Played
) -> dict[str, Any]:
    """`preference` is 1 for the baseline to 2 for the policy, the mean of both orders; null without a verdict."""
    question = questions[one.question]
    return {
        "instruction": question.turns[0],
        "dataset": question.category,
        "output_1": answers[config.baseline][one.question][0],
        "output_2": answers[one.policy][one.question][0],
        "generator_1": config.baseline,
        "generator_2": one.policy,
        "annotator": judge,
        "preference": None if one.scores is None else 1 + sum(one.scores) / 2,
    }


def _arena_hard(config: JudgeConfig, judge: str, questions: Sequence[Question], one: Played) -> dict[str, Any]:
    question = questions[one.question]
    rows = [
        {"score": None if verdict is None else verdict.label, "judgment": {"answer": _text(reply)}}
        for verdict, reply in zip(one.verdicts, one.replies, strict=True)
    ]
    name = "uid" if "uid" in question.source else "question_id"
    shared = {"category": question.category, "judge": judge, "model": one.policy, "baseline": config.baseline}
    return {name: question.id, **shared, "games": rows}


def _mt_bench(config: JudgeConfig, judge: str, questions: Sequence[Question], one: Played) -> dict[str, Any]:
    """The baseline is model_1, which game 1 shows first. FastChat takes different winners as a tie."""
    winners = []
    for verdict, better in zip(one.verdicts, (("model_1", "model_2"), ("model_2", "model_1")), strict=True):
        label = "[[C]]" if verdict is None else verdict.label
        winners.append("error" if verdict is None else {"[[A]]": better[0], "[[B]]": better[1]}.get(label, "tie"))
    return {
        "question_id": questions[one.question].source["question_id"],
        "model_1": config.baseline,
        "model_2": one.policy,
        "g1_winner": winners[0],
        "g2_winner": winners[1],
        "judge": [judge, "pair-v2-multi-turn" if one.turn else "pair-v2"],
        "g1_judgment": _text(one.replies[0]),
        "g2_judgment": _text(one.replies[1]),
        "turn": one.turn + 1,
        "tstamp": 0.0,
    }


def _text(reply: Mapping[str, Any]) -> str:
    return str(reply["message"].get("content") or "")


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_lines(rows))
