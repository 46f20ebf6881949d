"""bench/tables.py replaces one block of a page and nothing else."""

from pathlib import Path

import pytest

from bench.tables import block_of, replace_block, table

PAGE = """# Page

<!-- speed: written by make bench -->
old
<!-- /speed -->

<!-- speed_gpu: written by make bench-gpu -->
kept
<!-- /speed_gpu -->
"""


def test_a_block_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    body = table(("a", "b"), [("1", "2")])
    replace_block(page, "speed", body)
    assert block_of(page, "speed") == body == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert page.read_text().replace(f"\n\n{body}\n\n", "\nold\n") == PAGE
    replace_block(page, "speed", body)
    assert page.read_text().count(body) == 1


@pytest.mark.parametrize("text", ["", PAGE + PAGE, PAGE.replace("<!-- /speed -->", "")])
def test_a_page_without_exactly_one_block_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="'<!-- speed: written by COMMAND -->'"):
        replace_block(page, "speed", "new")
    assert page.read_text() == text
