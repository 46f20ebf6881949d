"""Hostile texts on every way into the page: prompt, responses, the name and rows of a file, a link, and saved files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.page.browser import RAN, Visit, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser


PER_REQUEST = 8
SETTLED_MS = 60
LINK = """async (input) => {
  const { fragmentOf } = await import("/web/link.js");
  return fragmentOf({ pair: input.prompt, input, choices: { signal: input.prompt, palette: input.prompt } });
}"""


def attacked(browser: "Browser", url: str, texts: list[str], folder: Path) -> dict[str, int]:
    """How many texts ran, how often the policy was violated, and how many requests left the service."""
    counts = {"xss_texts": len(texts), "xss_ran": 0, "policy_violations": 0, "outside_requests": 0, "page_errors": 0}
    with visit(browser, url) as found:
        for start in range(0, len(texts), PER_REQUEST):
            some = texts[start : start + PER_REQUEST]
            found.score(some[0], *some)
            _touch(found)
            _open_saved(found, folder)
        for text in texts:
            _through_file(found, text)
        violations = found.violations()
        for text in texts:
            _through_link(found, text)
        violations += found.violations()
        counts["xss_ran"] = len(found.ran)
        counts["policy_violations"] = len(violations)
        counts["outside_requests"] = len(found.outside)
        counts["page_errors"] = len(found.faults)
    return counts


def control(browser: "Browser", texts: list[str]) -> int:
    """How many of the texts run in a page that takes text for markup and has no policy: the texts are live."""
    context = browser.new_context()
    page, ran = context.new_page(), set[str]()
    current = ""
    page.expose_function(RAN, lambda: ran.add(current))
    for text in texts:
        current = text
        page.set_content(f"<p>{text}</p>", wait_until="commit")
        page.wait_for_timeout(SETTLED_MS)
    context.close()
    return len(ran)


def _touch(found: Visit) -> None:
    """Points at tokens and focuses one, as handlers of events wait for that."""
    found.page.locator(".t").first.hover()
    found.page.locator(".t").last.click()
    found.page.keyboard.press("ArrowLeft")


def _open_saved(found: Visit, folder: Path) -> None:
    """Opens the saved HTML and SVG as files, where no policy of the service protects them."""
    for button, name in (("#save-html", "saved.html"), ("#save-svg", "saved.svg")):
        with found.page.expect_download() as download:
            found.page.click(button)
        download.value.save_as(folder / name)
        other = found.page.context.new_page()
        other.on("dialog", found.dismiss)
        # The function of the page is not known there: a script that runs fails, and is seen by its error.
        other.on("pageerror", lambda error: found.ran.append(str(error)))
        other.goto((folder / name).as_uri())
        other.close()


def _through_file(found: Visit, text: str) -> None:
    name = text.replace("/", "∕").replace("\x00", "") or "file"
    row = json.dumps({"prompt": text, "chosen": text, "rejected": f"{text} "})
    found.renew()
    found.page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": row.encode()})
    found.shown()


def _through_link(found: Visit, text: str) -> None:
    response = {"text": text, "thoughts": ""}
    given = {"mode": "prompt", "prompt": text, "turns": [{"role": text, "text": text}], "responses": [response]}
    for fragment in _fragments(found, given, text):
        found.renew()
        found.page.evaluate("(fragment) => { location.hash = fragment; }", fragment)
    found.shown()


def _fragments(found: Visit, given: dict[str, Any], text: str) -> Iterator[str]:
    yield text
    yield found.page.evaluate(LINK, given)
