"""The report of real runs, opened in Chromium: what it requests, its errors, what it shows; a screenshot beside it."""

import subprocess
import tempfile
from pathlib import Path

from bench.circumstances import Json
from bench.evaluation.judging import PROGRAM, judge_job, verdict
from bench.evaluation.scripted_judge import ScriptedJudge
from bench.page.browser import DESKTOP, chromium, missing

RUN, PICTURE = Path("runs/demo"), Path("runs/evaluation_report.png")


def measure() -> tuple[Json, Json]:
    """One page of the demo's SFT run and of a judge run. Raises RuntimeError without a browser."""
    if reason := missing():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder, page_file = Path(name), Path(name) / "report.html"
        with ScriptedJudge(verdict) as judge:
            subprocess.run([*PROGRAM, *judge_job(folder, ["win", "tie", "loss"] * 10, judge.url)], check=True)
        subprocess.run([*PROGRAM, "report", str(RUN), str(folder / "run"), "--output", str(page_file)], check=True)
        page = browser.new_page(viewport=DESKTOP)
        requests: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(page_file.as_uri())
        pictures = page.evaluate("[...document.images].filter(one => one.complete && one.naturalWidth > 0).length")
        figures: Json = {
            "report_outside_requests": sum(not one.startswith((page_file.as_uri(), "data:")) for one in requests),
            "report_faults": len(faults),
            "report_tables": page.locator("table").count(),
            "report_pictures_shown": pictures,
            "report_wider_than_the_window": page.evaluate("document.documentElement.scrollWidth > innerWidth"),
        }
        page.screenshot(path=str(PICTURE), full_page=True)
        return figures, {
            "requests": len(requests),
            "faults": faults,
            "bytes": page_file.stat().st_size,
        }
