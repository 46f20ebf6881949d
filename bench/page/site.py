"""`python -m bench.page.site`: the documentation site in Chromium: what axe-core finds, and requests to other hosts.

Writes `site_axe_violations` and `site_outside_requests` to the results. Needs build/site, which `make docs` builds.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from bench.circumstances import circumstances
from bench.page.browser import DESKTOP, PHONE, axe_violations, chromium, missing, visit
from bench.page.figures import write_figures

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Every page is looked at in both colour schemes and both sizes, but not in all four combinations.
WAYS = ((("light", DESKTOP), ("dark", PHONE)), (("dark", DESKTOP), ("light", PHONE)))
SITE = Path(__file__).resolve().parents[2] / "build" / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def main() -> int:
    """Returns exit code 1 if something was found; 0 without a browser, because the site is built without one."""
    if reason := missing():
        print(f"not looked at in a browser: {reason}", file=sys.stderr)
        return 0
    with chromium() as browser, served() as url:
        violations, outside = looked_at(browser, url)
    for found in (*violations, *outside):
        print(found)
    where = circumstances()
    write_figures(
        {"site_axe_violations": len(violations), "site_outside_requests": len(outside), "site_at": where["commit"]}
    )
    return 1 if violations or outside else 0


def pages() -> list[str]:
    """The pages of the site, without those that only show a file."""
    every = (str(page.relative_to(SITE)) for page in SITE.rglob("*.html"))
    return sorted(page for page in every if not page.startswith("files/") and page != "404.html")


@contextmanager
def served() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def looked_at(browser: "Browser", url: str) -> tuple[list[str], list[str]]:
    """Violations, and requests to other hosts, of every page."""
    violations: list[str] = []
    outside: list[str] = []
    for at, page in enumerate(pages()):
        for scheme, size in WAYS[at % len(WAYS)]:
            with visit(browser, url, f"/{page}", color_scheme=scheme, viewport=size) as seen:
                where = f"{page} ({scheme}, {size['width']} px)"
                violations += [f"{where}: {found}" for found in axe_violations(seen.page)]
                outside += seen.outside
    return violations, outside


if __name__ == "__main__":
    sys.exit(main())
