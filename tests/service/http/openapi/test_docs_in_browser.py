"""Swagger UI at /docs in a real Chromium: with a key every route can be tried, and nothing is loaded from outside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running_service import Served, served

from bench.page.browser import axe_violations, chromium, missing, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
KEY = "a-key-of-the-browser-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as running:
        yield running


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Served]:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "browser", "key": KEY}]))
    with served(api_keys_file=file) as running:
        yield running


def execute(page: "Page", operation: str) -> str:
    """The status of the request that Swagger UI sends with the first example of an operation."""
    block = page.locator(f"#operations-{operation}")
    if block.locator(".btn.execute").count() == 0:
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
    block.locator(".btn.execute").click()
    page.wait_for_load_state("networkidle")
    return str(block.locator(".live-responses-table .response-col_status").last.inner_text())


def test_a_key_is_given_once_and_then_every_route_can_be_tried(browser: "Browser", keyed: Served) -> None:
    with visit(browser, str(keyed.client.base_url).rstrip("/"), "/docs") as seen:
        page = seen.page
        page.wait_for_selector("#operations-scoring-score")
        assert execute(page, "scoring-score") == "401"
        page.click(".btn.authorize")
        page.fill(".auth-container input", KEY)
        assert axe_violations(page) == [], "in the dialog"
        page.click(".auth-btn-wrapper .authorize")
        page.click(".auth-btn-wrapper .btn-done")
        assert execute(page, "scoring-score") == "200"
        assert '"wire_version": "1.0"' in page.inner_text("#operations-scoring-score .live-responses-table")
        assert execute(page, "scoring-list_models") == "200"
        assert axe_violations(page) == [], "beside an answer"
        assert (seen.faults, seen.violations(), seen.outside) == ([], [], [])
