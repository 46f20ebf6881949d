"""Writes the tables of docs/templates.md from bench/results/templates.json and bench/results/rendering.json."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "templates.md"
RESULTS = ROOT / "bench" / "results" / "templates.json"
RENDERING = ROOT / "bench" / "results" / "rendering.json"
REASON_CHARACTERS = 90
VERDICTS = {"served": "served", "decision": "needs a decision", "refused": "refused"}


class Outcome(TypedDict):
    flags: str
    chats: Mapping[str, str]
    reasons: Mapping[str, str]


class Row(TypedDict):
    """One template: bench.templates.verdict.Verdict with its repository and name."""

    repository: str
    name: str
    verdict: str
    reason: str
    end_of_turn: str
    end_is_named: bool
    date: bool
    outcomes: Sequence[Outcome]


class Results(TypedDict):
    date: str
    repositories: Mapping[str, str]
    templates: Sequence[Row]


class Rendering(TypedDict):
    """Template -> verdict of a chat -> how often. `refused`: template -> reason of each chat that is refused here."""

    date: str
    versions: Mapping[str, str]
    chats: int
    templates: Mapping[str, Mapping[str, int]]


def write() -> None:
    """Replace the blocks of the page."""
    for name, body in blocks().items():
        replace_block(PAGE, name, body)


def blocks() -> dict[str, str]:
    """Name of the block -> its text."""
    results: Results = json.loads(RESULTS.read_text("utf-8"))
    rendering: Rendering = json.loads(RENDERING.read_text("utf-8"))
    return {"templates": templates_block(results), "rendering": rendering_block(rendering)}


def templates_block(results: Results) -> str:
    rows = results["templates"]
    count = Counter(row["verdict"] for row in rows)
    chats = [is_ for row in rows for outcome in row["outcomes"] for is_ in outcome["chats"].values()]
    commits = ", ".join(f"{name} at `{commit}`" for name, commit in results["repositories"].items())
    head = (
        f"{results['date']}: {len(rows)} templates, {commits}. {count['served']} are served, {count['decision']} need "
        f"a decision, {count['refused']} are refused. Of {len(chats)} chats with each decision, {chats.count('equal')} "
        f"have the template's ids, {chats.count('DIFFERENT')} have others, {chats.count('refused')} are refused, and "
        f"{chats.count('-')} are not rendered by the template as a whole."
    )
    body = table(
        ("template", "verdict", "end of turn", "decision", "chats"),
        [(f"{row['repository']}/{row['name']}", VERDICTS[row["verdict"]], _end(row), *_outcomes(row)) for row in rows],
    )
    return f"{head}\n\n{body}"


def _end(row: Row) -> str:
    end = _code(row["end_of_turn"]) if row["end_of_turn"] else ""
    return f"{end} (`--end-of-turn`)" if row["end_is_named"] else end


def _outcomes(row: Row) -> tuple[str, str]:
    if row["verdict"] == "refused":
        reason = row["reason"]
        cut = reason if len(reason) <= REASON_CHARACTERS else f"{reason[:REASON_CHARACTERS]}..."
        return "", _text(cut)
    flags = "<br>".join(_code(outcome["flags"]) if outcome["flags"] else "none" for outcome in row["outcomes"])
    return flags, "<br>".join(_chats(outcome) for outcome in row["outcomes"])


def _chats(outcome: Outcome) -> str:
    """'all equal', or how many and which others."""
    chats = outcome["chats"]
    groups = {is_: [name for name, found in chats.items() if found == is_] for is_ in chats.values()}
    equal = len(groups.pop("equal", []))
    if not groups:
        return "all equal"
    names = {"-": "no rendering"}
    return "; ".join(
        [f"{equal} equal", *(f"{names.get(is_, is_)}: {', '.join(group)}" for is_, group in groups.items())]
    )


def rendering_block(rendering: Rendering) -> str:
    verdicts = ("equal", "DIFFERENT", "refused here", "refused by both")
    head = f"{rendering['date']}, vLLM {rendering['versions']['vllm']}, {rendering['chats']} chats in 3 ways:"
    rows = [(name, *(str(found.get(is_, 0)) for is_ in verdicts)) for name, found in rendering["templates"].items()]
    return f"{head}\n\n{table(('template', *verdicts), rows)}"


def _code(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    fence = "``" if "`" in shown else "`"
    return f"{fence}{shown}{fence}"


def _text(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
