"""Chromium, driven by Playwright: without a network of its own, and with the page's faults collected.

`make page` installs Playwright and axe-core into .page; Chromium is the system's.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
PATIENCE_MS = 60_000.0
WCAG_AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
RAN = "ran_from_a_text"
"""A function of the window that hostile texts call; it must never be called."""
REPORT_VIOLATIONS = """
window.policyViolations = [];
addEventListener("securitypolicyviolation", (event) => window.policyViolations.push(event.violatedDirective));
"""


def missing() -> str | None:
    """Why there can be no browser here; None if there can."""
    if executable() is None:
        return f"none of {', '.join(BROWSERS)} is on the PATH: install one of them"
    absent = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported: make page" if absent else None


def executable() -> str | None:
    """The path of the browser; None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A running browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - an optional environment

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass  # no slots: Playwright keeps its wrappers of handlers in the object
class Visit:
    """A page in a context of its own, and what happened in it.

    `ran`: what hostile texts ran. `faults`: errors of scripts. `outside`: requests to other hosts. `asked`: own ones.
    """

    page: "Page"
    ran: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """The directives of the policy that were violated."""
        return [str(directive) for directive in self.page.evaluate("window.policyViolations")]

    def dismiss(self, dialog: "Dialog") -> None:
        """Notes and closes a dialog: only a hostile text opens one."""
        self.ran.append(dialog.message)
        dialog.dismiss()

    def ready(self) -> None:
        """Waits until the served pairs are listed."""
        self.page.wait_for_selector("#pair option", state="attached")

    def shown(self) -> None:
        """Waits until the rewards, or an error, are on the page."""
        self.page.wait_for_selector("#answers[aria-busy=false], #error:not([hidden])", state="attached")

    def renew(self) -> None:
        """Makes `shown` wait for what comes next."""
        self.page.evaluate(
            "() => { document.getElementById('answers').ariaBusy = 'true';"
            " document.getElementById('error').hidden = true; }"
        )

    def score(self, prompt: str, *responses: str) -> None:
        """Fills the form, asks for rewards and waits for them."""
        self.page.fill("#prompt", prompt)
        while self.page.locator(".response").count() < len(responses):
            self.page.click("#add-response")
        for at, text in enumerate(responses):
            self.page.locator(".response .text").nth(at).fill(text)
        self.show()

    def show(self) -> None:
        """Asks for the rewards of what the form holds and waits for them."""
        self.renew()
        self.page.click("#show")
        self.shown()


@contextmanager
def visit(browser: "Browser", url: str, path: str = "/", **options: object) -> Iterator[Visit]:
    """The page of a service, once its pairs are listed if `path` is /."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    found = Visit(page)
    page.expose_function(RAN, lambda text="": found.ran.append(str(text)))
    page.add_init_script(REPORT_VIOLATIONS)
    page.on("pageerror", lambda error: found.faults.append(str(error)))
    page.on("dialog", found.dismiss)
    page.on("request", lambda request: _note(found, request.url, url))
    try:
        page.goto(f"{url}{path}")
        if path == "/":
            found.ready()
        yield found
    finally:
        context.close()


def _note(found: Visit, requested: str, url: str) -> None:
    if requested.startswith(f"{url}/"):
        found.asked.append(requested.removeprefix(url))
    elif not requested.startswith(("data:", "blob:")):
        found.outside.append(requested)


def axe_violations(page: "Page") -> list[str]:
    """What axe-core finds against WCAG 2.2 AA: the rule, and the elements that break it."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - an optional environment

    options = {"resultTypes": ["violations"], "runOnly": {"type": "tag", "values": WCAG_AA}}
    found = Axe().run(page, options=options).response["violations"]
    return [f"{rule['id']}: {'; '.join(str(node['target'][0]) for node in rule['nodes'])}" for rule in found]
