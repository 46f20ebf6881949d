"""docs/scale.md says what bench/results/scale.json and rolling.json hold."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


def test_what_became_of_the_requests_of_a_rolling_update() -> None:
    told = json.loads((ROOT / "bench" / "results" / "rolling.json").read_text("utf-8"))
    large, failed = told["large_requests"], told["requests"] - told["statuses"]["200"] + told["wrong"]
    assert f"| replicas replaced | {told['replaced']} |" in PAGE
    assert f"| requests of callers that never try again | {told['requests']:,} |" in PAGE
    assert f"| of these not answered, or wrongly | {failed} |" in PAGE
    assert f"| requests larger than the proxy's buffer, by `Client` | {sum(large.values())} |" in PAGE
    assert f"| of these failed | {large.get('failed', 0)} |" in PAGE
