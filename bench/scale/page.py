"""Writes the tables of docs/scale.md from bench/results: `python -m bench.scale page`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "scale.md"
Row = Mapping[str, float]
BOUNDS_TOKENS = (4096, 32_768, 65_536, 131_072)
RESPONSES = 8
OVERLOAD = {
    "goodput_ratio": "tokens answered, divided by tokens at capacity",
    "refusal_share": "share of requests refused",
    "closed_p50_ms": "closed loop, p50 of an answer",
    "closed_p99_ms": "closed loop, p99 of an answer",
    "open_p50_ms": "overload, p50 of an answer",
    "open_p99_ms": "overload, p99 of an answer",
}
ROUTES = {
    "a request for each prompt": "one request per prompt, least busy",
    "a request for each response, round robin": "one request per response, round robin",
    "..., least busy": "one request per response, least busy",
    "..., sticky by prompt": "one request per response, sticky by prompt",
    "..., sticky, bounded": "the same, no replica over 1.25 times its share",
}


class Scale(TypedDict):
    """Fields of bench/results/scale.json that are read."""

    overload: Mapping[str, Row]
    queue: Mapping[str, Sequence[Row]]
    cold_start: Mapping[str, Sequence[Row]]
    routing: Mapping[str, Sequence[Row]]


class Rolling(TypedDict):
    """Fields of bench/results/rolling.json that are read."""

    replaced: int
    requests: int
    statuses: Mapping[str, int]
    wrong: int
    large_requests: Mapping[str, int]
    seconds: float
    ready_s: Sequence[float]
    drained_s: Sequence[float]


def write() -> None:
    """Replaces the marked tables of the page. Raises ValueError if a marker is missing."""
    for name, body in blocks().items():
        replace_block(PAGE, name, body)
    print(f"wrote {PAGE.relative_to(ROOT)}")


def blocks() -> dict[str, str]:
    """Returns the tables by the names of their blocks."""
    scale: Scale = json.loads((RESULTS / "scale.json").read_text("utf-8"))
    shipped, chart = (
        json.loads((RESULTS / name).read_text("utf-8")) for name in ("rolling.json", "rolling_chart.json")
    )
    return {
        "overload": table(("", "measured", "simulated", "differs by"), _overload(scale["overload"])),
        "queue": table(
            (
                "bound, seconds of work",
                "step, p50",
                "attempts refused",
                "failed steps, patient client",
                "failed steps, 60 s and 120 s",
            ),
            _queue(*scale["queue"].values()),
        ),
        "cold_start": table(
            ("", "step, p50", "paid seconds of replicas per step"), _cold_start(*scale["cold_start"].values())
        ),
        "routing": table(("", "tokens computed per scored token", "step, p50", "p99"), _routing(scale["routing"])),
        "rolling": _rolling(shipped, chart),
    }


def _overload(found: Mapping[str, Row]) -> Iterator[Sequence[str]]:
    for name, label in OVERLOAD.items():
        row = found[name]
        form, unit = (",.0f", " ms") if name.endswith("_ms") else (".3f", "")
        simulated = f"{row['mean']:{form}} ± {row['std']:{form}}{unit}"
        yield label, f"{row['measured']:{form}}{unit}", simulated, _percent(abs(row["mean"] / row["measured"] - 1))


def _queue(patient: Sequence[Row], default: Sequence[Row]) -> Iterator[Sequence[str]]:
    for one, other in zip(patient, default, strict=True):
        if one["bound_tokens"] in BOUNDS_TOKENS:
            shares = one["refused_share"], one["failed_steps_share"], other["failed_steps_share"]
            yield f"{one['bound_s']:.0f}", f"{one['step_p50_s']:.0f} s", *map(_percent, shares)


def _cold_start(whole: Sequence[Row], in_parts: Sequence[Row], fixed: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Joins neighbouring cold starts with equal figures into one row."""
    for row in fixed:
        yield f"fixed, replicas: {row['replicas']:.0f}", *_step(row)
    for label, rows in {"64 requests in flight": whole, "32 requests in flight": in_parts}.items():
        for step, same in groupby(rows, _step):
            seconds = [f"{row['cold_start_s']:.0f}" for row in same]
            yield f"autoscaled, {label}, start takes {' to '.join(dict.fromkeys((seconds[0], seconds[-1])))} s", *step


def _step(row: Row) -> tuple[str, str]:
    return f"{row['step_p50_s']:.1f} s", f"{row['paid_s_per_step']:,.0f}"


def _routing(found: Mapping[str, Sequence[Row]]) -> Iterator[Sequence[str]]:
    for name, label in ROUTES.items():
        (row,) = (row for row in found[name] if row["responses"] == RESPONSES)
        yield label, f"{row['computed_per_scored']:.2f}", f"{row['step_p50_s']:.1f} s", f"{row['step_p99_s']:.1f} s"


def _rolling(shipped: Rolling, chart: Rolling) -> str:
    one, other = _rolled(shipped), _rolled(chart)
    rows = [(name, one[name], other[name]) for name in one]
    return table(("", "the proxy as shipped", "no retries, the chart's wait"), rows)


def _rolled(found: Rolling) -> dict[str, str]:
    large = found["large_requests"]
    return {
        "replicas replaced": f"{found['replaced']:,}",
        "requests of callers that never retry": f"{found['requests']:,}",
        "of these unanswered or answered wrongly": f"{found['requests'] - found['statuses']['200'] + found['wrong']:,}",
        "requests by `Client`, larger than the proxy's buffer": f"{sum(large.values()):,}",
        "of these failed": f"{large.get('failed', 0):,}",
        "seconds in total": f"{found['seconds']:.0f}",
        "seconds from start to ready": _span(found["ready_s"]),
        "seconds from SIGTERM to exit": _span(found["drained_s"]),
    }


def _span(seconds: Sequence[float]) -> str:
    return " to ".join(f"{one:.1f}" if one < 1 else f"{one:.0f}" for one in (min(seconds), max(seconds)))


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
