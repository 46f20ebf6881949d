"""The pictures of the page in the documents: the demo's pair on a desktop, in dark colours, and on a phone."""

from pathlib import Path
from typing import TYPE_CHECKING

from bench.page.browser import PHONE, Visit, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator


PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SETTLED_MS = 400
TALL = {"width": 1280, "height": 1370}  # room for the card below its token


def take(browser: "Browser", url: str) -> None:
    """Writes page_desktop.png, page_dark.png and page_phone.png."""
    with visit(browser, url, viewport=TALL) as seen:
        _example(seen)
        _forgotten_carry(seen).hover()
        _write(seen, "page_desktop", full_page=True)
    with visit(browser, url, color_scheme="dark") as seen:
        _example(seen)
        seen.page.select_option("#signal", "sft_logprob")
        _write(seen, "page_dark", full_page=True)
    with visit(browser, url, viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True) as seen:
        _example(seen)
        seen.page.locator("article").nth(1).scroll_into_view_if_needed()
        _forgotten_carry(seen).tap()
        _write(seen, "page_phone", full_page=False)


def _example(seen: Visit) -> None:
    seen.page.click("#example")
    seen.shown()


def _forgotten_carry(seen: Visit) -> "Locator":
    """The lowest token of the second response."""
    return seen.page.locator("article").nth(1).locator(".t.low")


def _write(seen: Visit, name: str, *, full_page: bool) -> None:
    seen.page.wait_for_timeout(SETTLED_MS)
    path = PICTURES / f"{name}.png"
    seen.page.screenshot(path=path, full_page=full_page)
    print(f"written: {path}")
