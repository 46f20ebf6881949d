"""Replaces blocks of a Markdown page by tables that a command writes, so that no figure is copied by hand.

A block starts with `<!-- NAME: written by COMMAND -->` and ends with `<!-- /NAME -->`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def replace_block(page: Path, name: str, body: str) -> None:
    """Replaces the text between the two markers of a block. Raises ValueError unless the page has the block once."""
    text = page.read_text("utf-8")
    start, end = _span(page, text, name)
    page.write_text(f"{text[:start]}\n\n{body.strip()}\n\n{text[end:]}", "utf-8")


def block_of(page: Path, name: str) -> str:
    """Returns the text between the two markers, stripped. Raises ValueError unless the page has the block once."""
    text = page.read_text("utf-8")
    start, end = _span(page, text, name)
    return text[start:end].strip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _span(page: Path, text: str, name: str) -> tuple[int, int]:
    """Returns where the text between the markers starts and ends."""
    opening = rf"<!-- {re.escape(name)}: written by [^\n]* -->"
    found = list(re.finditer(rf"{opening}(.*?)<!-- /{re.escape(name)} -->", text, re.DOTALL))
    if len(found) != 1:
        markers = f"'<!-- {name}: written by COMMAND -->' ... '<!-- /{name} -->'"
        raise ValueError(f"{page} has {len(found)} blocks {markers}, expected 1")
    return found[0].span(1)
