"""The `judge` job: win rates against a baseline, by a judge behind a URL, in the formats of the field's benchmarks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report

from dense_reward_trainer.configs.judge import JudgeConfig, JudgeOptions
from dense_reward_trainer.configs.sample import SampleConfig
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.data.sources import NO_SKIP, DataError, DataSource, load
from dense_reward_trainer.runs.next_step import again, finished, job, more_in, report_page
from dense_reward_trainer.runs.run_folder import check_run, open_run, pin
from dense_reward_trainer.text_table import aligned
from dense_reward_trainer.win_rates.benchmarks import (
    Question,
    Turns,
    as_lines,
    prompt_lines,
    read_answers,
    read_questions,
    write_answers,
)
from dense_reward_trainer.win_rates.contamination import overlaps
from dense_reward_trainer.win_rates.games import Answers, Game, Played, games, played, verdict_lines, write_judgements
from dense_reward_trainer.win_rates.judge import Judge, read_kept
from dense_reward_trainer.win_rates.statistics import cohens_kappa, length_controlled, win_rate

CHARACTERS_PER_TOKEN = 4  # OpenAI's rule of thumb for English


def run(config: JudgeConfig, report: Report) -> None:
    """Writes `win_rates.json`, `verdicts.jsonl` and the benchmark's own files to `config.output_dir`.

    A stopped job goes on, and asks only for verdicts that it does not have. Raises ConfigError, DataError or JobError.
    """
    check_run("judge", config)
    questions = read_questions(config.benchmark, config.questions)[: config.limit]
    answers = {name: read_answers(path, questions) for name, path in config.answers.items()}
    training = None if config.training_prompts is None else _training_prompts(config, report)
    opened = open_run("judge", config)
    pin(opened, {"questions": hashlib.sha256(as_lines(dict(q.source) for q in questions)).hexdigest()})
    if not _ready(config, questions, answers, report):
        return
    contaminated = _contamination(config, questions, training, report)
    for name, turns in answers.items():
        write_answers(config.benchmark, opened.folder / config.benchmark, name, questions, turns)
    rounds = {name: games(config, judge, questions, answers) for name, judge in config.judges.items()}
    for name, judge in config.judges.items():
        report(_estimate(config, name, judge, rounds[name]))
    if config.estimate_only:
        report(finished(opened.folder, again("judge", config, {"estimate_only": False})))
        return
    results = {}
    lines: list[dict[str, Any]] = []
    for name, judge in config.judges.items():
        kept = Judge(judge, report).ask(
            [game.request for game in rounds[name]], opened.folder / f"replies_{name}.jsonl"
        )
        results[name] = played(config, rounds[name], kept)
        _report_unreadable(name, results[name], report)
        lines += verdict_lines(config, name, rounds[name], results[name])
        write_judgements(config, name, questions, answers, results[name])
    write_whole(opened.folder / "verdicts.jsonl", as_lines(lines))
    figures = _figures(config, results, answers, contaminated)
    write_whole(opened.folder / "win_rates.json", json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")
    report(_table(config, figures))
    report(finished(opened.folder / "win_rates.json", report_page(opened.folder)))


def _ready(
    config: JudgeConfig, questions: Sequence[Question], answers: Mapping[str, Sequence[Turns]], report: Report
) -> bool:
    """Whether every policy has answered every turn. Else writes the prompts that are to be answered first."""
    folder = config.output_dir / "prompts"
    if not answers:
        folder.mkdir(exist_ok=True)
        write_whole(folder / "turn_1.jsonl", prompt_lines(questions))
        report(finished(folder / "turn_1.jsonl", _sample(config, folder / "turn_1.jsonl")))
        return False
    waiting = []
    for name, turns in answers.items():
        if any(len(given) < len(question.turns) for given, question in zip(turns, questions, strict=True)):
            if any(len(question.turns) < 2 or not given for given, question in zip(turns, questions, strict=True)):
                raise DataError(f"the answers of {name} lack turns of some questions: sample the prompts once more")
            folder.mkdir(exist_ok=True)
            waiting.append(folder / f"turn_2_{name}.jsonl")
            write_whole(waiting[-1], prompt_lines(questions, turns))
    if waiting:
        report(f"second turns are still to be answered, in {', '.join(str(path) for path in waiting)}")
        report(finished(folder, _sample(config, waiting[0])))
    return not waiting


def _sample(config: JudgeConfig, prompts: Path) -> str:
    """The command that answers the prompts by a policy, which only the user knows."""
    keys = {"policy": "CHECKPOINT", "prompts": prompts, "output_dir": more_in(config.output_dir, "answers")}
    return job("sample", SampleConfig, keys, default="sample_full", match="prompts")


def _training_prompts(config: JudgeConfig, report: Report) -> list[str]:
    source = DataSource(source=str(config.training_prompts), held_out_fraction=0.0)
    loaded = load(source, cure=NO_SKIP, prompts_only=True)
    report(loaded.summary)
    messages = (message.as_mapping() for row in loaded.demonstrations for message in row.prompt_messages)
    return [str(message["content"]) for message in messages if message["role"] == "user"]


def _contamination(
    config: JudgeConfig, questions: Sequence[Question], training: Sequence[str] | None, report: Report
) -> list[bool] | None:
    if training is None:
        return None
    found = overlaps(training, [question.turns[0] for question in questions])
    rows = [
        {"question": q.id, "exact": o.exact, "ngram_13": o.ngram_13, "share_8": round(o.share_8, 4)}
        for q, o in zip(questions, found, strict=True)
    ]
    write_whole(config.output_dir / "contamination.jsonl", as_lines(rows))
    report(
        f"{sum(o.contaminated for o in found)} of {len(found)} test prompts occur in the training prompts "
        f"({sum(o.exact for o in found)} whole, {sum(o.ngram_13 for o in found)} by 13 words in a row)"
    )
    return [overlap.contaminated for overlap in found]


def _estimate(config: JudgeConfig, name: str, judge: JudgeOptions, pairs: Sequence[Game]) -> str:
    """What is still to be asked, in tokens and, with prices, in money. Replies count at their longest."""
    kept = read_kept(config.output_dir / f"replies_{name}.jsonl")
    waiting = {game.key: game.request for game in pairs if game.key not in kept}
    characters = sum(len(m["content"]) for request in waiting.values() for m in request["messages"])
    asked, longest = characters // CHARACTERS_PER_TOKEN, judge.max_tokens * len(waiting)
    cost = (asked * (judge.input_price or 0) + longest * (judge.output_price or 0)) / 1e6
    priced = judge.input_price is not None or judge.output_price is not None
    money = f", at most {cost:,.2f} by the prices given" if priced else ""
    return f"{name}: {len(waiting):,} requests, about {asked:,} prompt tokens, at most {longest:,} reply tokens{money}"


def _report_unreadable(name: str, found: Sequence[Played], report: Report) -> None:
    pairs = [(v, reply) for one in found for v, reply in zip(one.verdicts, one.replies, strict=True)]
    bad = [reply for verdict, reply in pairs if verdict is None]
    if bad:
        cut = sum(reply.get("finish_reason") == "length" for reply in bad)
        example = str(bad[0]["message"].get("content") or "")[-120:]
        report(
            f"{name}: {len(bad)} of {len(pairs)} replies hold no verdict ({cut} cut off at max_tokens), such as "
            f"{example!r}. Their questions are left out of the win rate, in both orders"
        )


def _figures(
    config: JudgeConfig, results: Mapping[str, Sequence[Played]], answers: Answers, dirty: Sequence[bool] | None
) -> dict[str, Any]:
    policies = [name for name in answers if name != config.baseline]
    rows = []
    for policy in policies:
        for name, found in results.items():
            of_policy = [one for one in found if one.policy == policy]
            rows.append({"policy": policy, "judge": name, **_row(config, of_policy, answers, dirty)})
    kappas = [
        {"judges": [one, other], "cohens_kappa": _number(_kappa(results[one], results[other]))}
        for one, other in combinations(results, 2)
    ]
    return {"benchmark": config.benchmark, "baseline": config.baseline, "rows": rows, "agreement": kappas}


def _row(
    config: JudgeConfig, found: Sequence[Played], answers: Answers, dirty: Sequence[bool] | None
) -> dict[str, Any]:
    """The figures of one policy under one judge. A question's turns are resampled together."""
    judged = [one for one in found if one.scores is not None]
    counts = {
        f"{name}s" if name == "tie" else f"{name}_wins": sum(one.winner == name for one in found)
        for name in ("policy", "tie", "baseline")
    }
    counts["unreadable"] = len(found) - len(judged)
    if not judged:
        return counts
    indices = sorted({one.question for one in judged})
    totals = {index: np.zeros(2) for index in indices}
    for one in judged:
        totals[one.question] += one.weighted
    sums_Q2 = np.stack([totals[index] for index in indices])
    scores_Q, weights_Q = sums_Q2[:, 0] / sums_Q2[:, 1], sums_Q2[:, 1]
    policy = found[0].policy
    lengths_2Q = np.array(
        [[sum(map(len, answers[name][index])) for index in indices] for name in (policy, config.baseline)], dtype=float
    )
    pairs = [one.scores for one in judged if one.scores is not None]
    figures: dict[str, Any] = {
        **counts,
        "win_rate": _interval(win_rate(scores_Q, weights_Q, config.seed)),
        "length_controlled": _interval(length_controlled(scores_Q, lengths_2Q[0], lengths_2Q[1], config.seed)),
        "mean_characters": float(lengths_2Q[0].mean()),
        "baseline_mean_characters": float(lengths_2Q[1].mean()),
        "same_in_both_orders": float(np.mean([a == b for a, b in pairs])),
        "shown_first_wins": float(np.mean([(1 - a + b) / 2 for a, b in pairs])),
    }
    if dirty is not None:
        clean_Q = np.array([not dirty[index] for index in indices])
        figures["clean_questions"] = int(clean_Q.sum())
        if clean_Q.any():
            figures["clean_win_rate"] = _interval(win_rate(scores_Q[clean_Q], weights_Q[clean_Q], config.seed))
    return figures


def _kappa(first: Sequence[Played], second: Sequence[Played]) -> float:
    both = [(a.winner, b.winner) for a, b in zip(first, second, strict=True) if "error" not in (a.winner, b.winner)]
    return cohens_kappa([a for a, _ in both], [b for _, b in both])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def _table(config: JudgeConfig, figures: Mapping[str, Any]) -> str:
    rows = [["policy", "judge", "win rate", "length-controlled", "won/tied/lost", "no verdict", "shown first wins"]]
    for row in figures["rows"]:
        shown = row.get("shown_first_wins")
        rows.append(
            [
                row["policy"],
                row["judge"],
                _percent(row.get("win_rate")),
                _percent(row.get("length_controlled")),
                f"{row['policy_wins']}/{row['ties']}/{row['baseline_wins']}",
                str(row["unreadable"]),
                "-" if shown is None else f"{shown:.1%}",
            ]
        )
    agreement = [f"Cohen's kappa of {' and '.join(k['judges'])}: {k['cohens_kappa']}" for k in figures["agreement"]]
    return "\n".join([f"against {config.baseline}, 95 % intervals over questions:", aligned(rows), *agreement])


def _percent(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"
