"""How long the main thread of a page is busy at a time, from a trace of Chromium."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


CATEGORIES = ["toplevel", "disabled-by-default-devtools.timeline"]
MAIN_THREAD = "CrRendererMain"
TASK = "RunTask"


def traced(browser: "Browser", page: "Page", work: Callable[[], None]) -> tuple[float, float]:
    """The longest task of the page's main thread during `work`, in ms: by the clock, and in CPU time.

    By the clock, a task is also longer by the time in which other processes had the core.
    """
    browser.start_tracing(page=page, categories=CATEGORIES)
    work()
    return longest(json.loads(browser.stop_tracing())["traceEvents"])


def longest(events: list[dict[str, Any]]) -> tuple[float, float]:
    """The longest task in a trace, as `traced` gives it. Raises ValueError if the trace has no tasks."""
    main = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"]["name"] == MAIN_THREAD}
    tasks = [e for e in events if e["ph"] == "X" and e["name"].endswith(TASK) and (e["pid"], e["tid"]) in main]
    return max(e["dur"] for e in tasks) / 1000, max(e.get("tdur", e["dur"]) for e in tasks) / 1000
