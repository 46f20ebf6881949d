"""The command `stats`: prints the statistics, and writes them as JSON and as a picture."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dense_reward.bulk.stats.collected import Collected, Span
from dense_reward.bulk.stats.quantiles import Distribution
from dense_reward.bulk.stats.scored_rows import incomplete, scored_rows
from dense_reward.bulk.stats.together import notes_on
from dense_reward.checkpoints.slow_step import slow_step
from dense_reward.errors import BulkError, SettingsError
from dense_reward.heatmap.visible import visible

Named = Sequence[tuple[str, Distribution]]


def print_stats(options: argparse.Namespace) -> int:
    """Raises BulkError for a file that `score` did not write, SettingsError for a wrong option."""
    if options.span < 1 or options.lowest < 0:
        raise SettingsError("--span must be at least 1, and --lowest at least 0")
    files = {file.resolve() for file in options.files}
    if len(files) < len(options.files):
        raise SettingsError("a file is named twice, so its rows would count twice: name it once")
    for name, written in (("--json", options.json), ("--plot", options.plot)):
        if written is not None and written.resolve() in files:
            raise SettingsError(f"{name} {written} is a FILE: name another one")
    for note in notes_on(options.files):
        print(note)
    collected = Collected(options.lowest, options.span)
    for file in options.files:
        if missing := incomplete(file):
            print(missing)
        with slow_step(lambda text: print(text, file=sys.stderr), f"reading {file}"):
            collected.add_all(scored_rows(file))
    for line in report(collected):
        print(line)
    if options.json is not None:
        with _written("--json", options.json):
            options.json.write_text(json.dumps(as_json(collected), indent=2) + "\n", "utf-8")
        print(f"numbers: {options.json}")
    if not options.no_plot and collected.by_all.of(0) is not None:
        print(_drawn(collected, options.plot or options.files[0].with_suffix(".stats.png")))
    return 0


def _drawn(collected: Collected, path: Path) -> str:
    try:
        from dense_reward.bulk.stats.picture import draw
    except ImportError:
        return "no picture: pip install matplotlib"
    with _written("--plot", path):
        draw(collected, path)
    return f"picture: {path}"


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """Raises BulkError if a file cannot be written: also for a suffix that is no format of a picture."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BulkError(f"{path} cannot be written ({error}): name another file with {option}") from None


def report(collected: Collected) -> Iterator[str]:
    """The lines of the report."""
    errors = f"; {collected.errors} rows have an error and are not included" if collected.errors else ""
    yield f"{collected.responses} responses{errors}. Rewards in nats."
    if collected.not_finite:
        first = f"the first is {collected.first_not_finite}"
        yield f"{collected.not_finite} more have a reward that is not finite and are not included; {first}."
    overall, sums = collected.by_all.of(0), collected.sums.of(0)
    if overall is None or sums is None:
        yield "No token has a reward."
        return
    yield from _table("all", [("tokens", overall), ("sums of responses", sums)])
    yield from _table("by position, from 0", collected.positions)
    yield from _table("means of responses by length", collected.lengths)
    if collected.classes:
        yield from _table("by class of token", collected.classes)
    if collected.without_tokens:
        yield f"{collected.without_tokens} responses have no tokens: include them (--include tokens,reward) for classes"
    if collected.spans:
        yield f"\nlowest spans of {collected.span} tokens, by their mean reward; at most one of a response"
        yield from map(_line, collected.spans)


def _table(title: str, rows: Named) -> Iterator[str]:
    yield f"\n{title:34}{'count':>12}{'mean':>9}{'std':>9}{'p5':>9}{'p50':>9}{'p95':>9}{'below 0':>9}"
    for name, d in rows:
        numbers = "".join(f"{value:9.3f}" for value in (d.mean, d.std, d.p5, d.p50, d.p95))
        yield f"  {name:32}{d.count:12,}{numbers}{d.negative:9.1%}"


def _line(span: Span) -> str:
    place = f"{span.mean:8.3f}  {span.file} row {span.row}, response {span.response_index}, "
    place += f"tokens {span.start}-{span.end - 1}"
    if span.text is None:
        return place
    return f"{place}: {visible(span.before or '')}«{visible(span.text)}»{visible(span.after or '')}"


def as_json(collected: Collected) -> dict[str, object]:
    """The numbers of the report."""
    overall, sums = collected.by_all.of(0), collected.sums.of(0)
    groups = {"position": collected.positions, "length": collected.lengths, "class": collected.classes}
    return {
        "responses": collected.responses,
        "errors": collected.errors,
        "not_finite": collected.not_finite,
        "tokens": None if overall is None else asdict(overall),
        "sums": None if sums is None else asdict(sums),
        **{f"by_{name}": {group: asdict(found) for group, found in rows} for name, rows in groups.items()},
        "lowest": [asdict(span) for span in collected.spans],
    }
