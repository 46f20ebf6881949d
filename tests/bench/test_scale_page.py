"""docs/scale.md says what bench/results/scale.json and rolling.json hold."""

import json
from pathlib import Path
from typing import TypedDict

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
Row = dict[str, float]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[Row]]]:
    told: dict[str, dict[str, list[Row]]] = json.loads((ROOT / "bench" / "results" / "scale.json").read_text("utf-8"))
    return told


def test_how_long_queues_should_be(found: dict[str, dict[str, list[Row]]]) -> None:
    patient, hasty = found["queue"].values()
    for one, other in list(zip(patient, hasty, strict=True))[:1] + list(zip(patient, hasty, strict=True))[3:6]:
        figures = f"| {one['bound_s']:.0f} | {one['step_p50_s']:.0f} s | {one['refused_share']:.0%} |"
        figures += f" {one['failed_steps_share']:.0f} | {other['failed_steps_share']:.0%} |"
        assert figures.replace("%", " %").replace("| 0 % |", "| 0 |") in PAGE


def test_what_autoscaling_gains(found: dict[str, dict[str, list[Row]]]) -> None:
    at_once, in_parts, fixed = found["cold_start"].values()
    assert {f"{row['step_p50_s']:.1f}" for row in at_once} == {"85.7"}
    for row in [*at_once[:6], *in_parts[:6], *fixed]:
        assert f"| {row['step_p50_s']:.1f} s | {row['paid_s_per_step']:,.0f} |" in PAGE


def test_what_routes_cost(found: dict[str, dict[str, list[Row]]]) -> None:
    for rows in found["routing"].values():
        (row,) = (row for row in rows if row["responses"] == 8)
        figures = f"| {row['computed_per_scored']:.2f} | {row['step_p50_s']:.1f} s | {row['step_p99_s']:.1f} s |"
        assert figures in PAGE


def test_how_near_the_simulation_is(found: dict[str, dict[str, Row]]) -> None:
    for name in ("goodput_ratio", "refusal_share"):
        row = found["overload"][name]
        assert f"| {row['measured']:.3f} | {row['mean']:.3f} ± {row['std']:.3f} |" in PAGE
    for name in ("open_p50_ms", "open_p99_ms"):
        row = found["overload"][name]
        assert f"| {row['measured']:,.0f} ms | {row['mean']:,.0f} ± {row['std']:.0f} ms |" in PAGE


ROWS = (
    "replicas replaced",
    "requests of callers that never try again",
    "of these not answered, or wrongly",
    "requests larger than the proxy's buffer, by `Client`",
    "of these failed",
    "seconds in all; from a start to ready; from SIGTERM to the end",
)


class Rolled(TypedDict):
    """What is read of a rolling update's results."""

    replaced: int
    requests: int
    statuses: dict[str, int]
    wrong: int
    large_requests: dict[str, int]
    seconds: float
    ready_s: list[float]
    drained_s: list[float]


def rolled(told: Rolled) -> tuple[str, ...]:
    """What the page says of a rolling update, row by row."""
    large, failed = told["large_requests"], told["requests"] - told["statuses"]["200"] + told["wrong"]
    drained = [f"{seconds:.1f}" if seconds < 1 else f"{seconds:.0f}" for seconds in sorted(told["drained_s"])]
    ready = [f"{seconds:.0f}" for seconds in sorted(told["ready_s"])]
    times = f"{told['seconds']:.0f}; {ready[0]} to {ready[-1]}; {drained[0]} to {drained[-1]}"
    counts = (told["replaced"], told["requests"], failed, sum(large.values()), large.get("failed", 0))
    return (*(f"{count:,}" for count in counts), times)


def test_what_became_of_the_requests_of_a_rolling_update() -> None:
    files = [ROOT / "bench" / "results" / name for name in ("rolling.json", "rolling_chart.json")]
    one, other = (rolled(json.loads(file.read_text("utf-8"))) for file in files)
    for row, shipped, chart in zip(ROWS, one, other, strict=True):
        assert f"| {row} | {shipped} | {chart} |" in PAGE
