"""`make page`: measures the page in Chromium, writes bench/results/page.json and the pictures of the documents."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dense_reward_trainer.jobs.demo import train_pair
from dense_reward_trainer.runs.local_service import free_port, serving_run

from bench.circumstances import circumstances
from bench.page.attack import attacked, control
from bench.page.browser import DESKTOP, axe_violations, chromium, missing, visit
from bench.page.figures import write_figures
from bench.page.hostile import hostile_texts
from bench.page.pictures import take
from bench.page.tasks import traced

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


LONG_RUN = Path("runs/page")
LONG = (
    "epochs=1",
    "milestones.reference=0.5",
    "scratch.max_position_embeddings=8192",
    "data.arithmetic.demonstrations=640",
)
LOADS = 21
LINES = 420
TOKENS = 5000


def main() -> int:
    """Returns exit code 0 once the results are written, 1 without a browser."""
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    where = circumstances()  # now: the pictures change the working tree
    train_pair()
    train = [sys.executable, "-m", "dense_reward_trainer.cli", "sft", "arithmetic_sft", f"output_dir={LONG_RUN}"]
    subprocess.run([*train, *LONG], check=True)
    with chromium() as browser:
        with serving_run(Path("runs/demo"), free_port()) as (_, url):
            take(browser, url)
            found = {
                "axe_violations": len(accessibility(browser, url)),
                "first_render_ms": first_render_ms(browser, url),
            }
        with serving_run(LONG_RUN, free_port()) as (_, url), tempfile.TemporaryDirectory() as folder:
            found |= long_text(browser, url)
            found |= attacked(browser, url, hostile_texts(), Path(folder))
            found["xss_ran_in_a_page_without_protection"] = control(browser, hostile_texts())
    write_figures(found | where)
    print(json.dumps(found, indent=1))
    return 0


def accessibility(browser: "Browser", url: str) -> list[str]:
    """What axe-core finds on the page in its states, in light and dark, and on /docs."""
    found: list[str] = []
    for scheme in ("light", "dark"):
        with visit(browser, url, color_scheme=scheme) as seen:
            found += axe_violations(seen.page)
            seen.page.click("#example")
            seen.shown()
            for palette in ("blue-red", "dark-red", "purple-green", "grey"):
                seen.page.select_option("#palette", palette)
                found += axe_violations(seen.page)
            seen.page.locator(".t").nth(3).click()
            seen.page.locator("label:has([value=chat])").click()
            found += axe_violations(seen.page)
    with visit(browser, url, "/docs") as seen:
        seen.page.wait_for_selector(".opblock")
        found += axe_violations(seen.page)
    for violation in found:
        print(f"axe: {violation}")
    return found


def first_render_ms(browser: "Browser", url: str) -> float:
    """The median time from navigation to the first contentful paint, each in a fresh context without a cache."""
    times: list[float] = []
    for _ in range(LOADS):
        context = browser.new_context(viewport=DESKTOP)  # plain: the functions of a visit would count too
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#pair option", state="attached")
        times.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        context.close()
    return round(statistics.median(times), 1)


def long_text(browser: "Browser", url: str) -> dict[str, float]:
    """The longest tasks with over 5,000 tokens: while they are drawn, while a user scrolls and points, and switches.

    Of two texts: one of short lines, and one without line feeds.
    """
    sums = [(one % 10, one * 7 % 10) for one in range(LINES)]
    lines = [f"{a}+{b}={a + b} write {(a + b) % 10} carry {(a + b) // 10}" for a, b in sums]
    measured: dict[str, list[tuple[float, float]]] = {"_drawing": [], "": [], "_switching": []}
    for separator in ("\n", " "):
        with visit(browser, url) as seen:
            page = seen.page
            page.fill("#prompt", "Add.")
            page.locator(".response .text").fill(separator.join(lines))
            measured["_drawing"].append(traced(browser, page, seen.show))
            page.wait_for_timeout(1000)
            tokens = page.locator(".t").count()
            assert tokens >= TOKENS, tokens
            measured[""].append(traced(browser, page, lambda: _scroll_and_point(page)))  # noqa: B023 - called here
            measured["_switching"].append(traced(browser, page, lambda: _switch(page)))  # noqa: B023
    found: dict[str, float] = {"tokens": tokens}
    for name, pairs in measured.items():
        found[f"longest_task{name}_ms"] = round(max(clock for clock, _ in pairs), 1)
        found[f"longest_task{name}_cpu_ms"] = round(max(cpu for _, cpu in pairs), 1)
    return found


def _scroll_and_point(page: "Page") -> None:
    page.mouse.move(600, 500)
    for step in range(60):
        page.mouse.wheel(0, 300)
        page.wait_for_timeout(30)
        page.mouse.move(80 + step * 13 % 900, 60 + step * 37 % 800)
        page.wait_for_timeout(20)


def _switch(page: "Page") -> None:
    for name, value in (("#signal", "kl"), ("#palette", "dark-red"), ("#signal", "reward"), ("#minus", "pearly")):
        if page.locator(f"{name} option[value='{value}']").count():
            page.select_option(name, value)
            page.wait_for_timeout(700)


if __name__ == "__main__":
    sys.exit(main())
