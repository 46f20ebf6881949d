"""`make page`: how its figures are read from a trace, its hostile texts, and what the committed figures must say."""

import json
from pathlib import Path

import pytest

from bench.page.hostile import CALL, COUNT, hostile_texts
from bench.page.tasks import longest

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "page.json"


def test_the_longest_task_is_that_of_the_pages_main_thread() -> None:
    def task(thread: int, dur: int, name: str = "RunTask") -> dict[str, object]:
        return {"name": name, "ph": "X", "pid": 1, "tid": thread, "dur": dur, "tdur": dur // 2}

    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
        for thread, name in ((7, "CrRendererMain"), (8, "Compositor"))
    ]
    assert longest([*names, task(7, 9000), task(7, 12000), task(8, 90000), task(7, 50000, "Layout")]) == (12.0, 6.0)
    with pytest.raises(ValueError, match=r"empty|iterable"):
        longest(names)


def test_the_hostile_texts_are_many_different_and_call_what_must_not_run() -> None:
    texts = hostile_texts()
    assert len(texts) == len(set(texts)) == COUNT
    plain = sum(CALL in text for text in texts)
    assert plain > COUNT // 2, "the others call it in a code"


def test_the_committed_figures_are_within_the_bounds_of_the_page() -> None:
    figures = json.loads(RESULTS.read_text("utf-8"))
    assert figures["axe_violations"] == 0
    assert figures["xss_texts"] == COUNT
    assert figures["xss_ran"] == figures["policy_violations"] == figures["outside_requests"] == 0
    assert figures["xss_ran_in_a_page_without_protection"] > COUNT // 3, "the texts would run elsewhere"
    assert figures["tokens"] >= 5000
    assert figures["longest_task_ms"] < 50
    assert figures["longest_task_drawing_ms"] < 50
    assert figures["longest_task_switching_ms"] < 50


def test_the_committed_figures_of_the_documentation_are_those_of_a_whole_site_whose_blocks_run() -> None:
    figures = json.loads(RESULTS.read_text("utf-8"))
    assert figures["blocks_run"] >= 40
    assert figures["blocks_failed"] == 0
    assert figures["site_axe_violations"] == figures["site_outside_requests"] == 0
