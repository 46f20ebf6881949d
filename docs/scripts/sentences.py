"""Prints sentences of the documentation, drawn at random, for a reader who marks those that must be read twice.

`python -m docs.scripts.sentences SEED [--count 200]`. Left out: history (the log, the decisions, the changelog), text
that a program writes, code blocks and headings. A cell of a table counts as a sentence if it has at least five words.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.scripts.blocks import BLOCK, ROOT, documents
from docs.scripts.markdown import GENERATED

WORDS = 5
WRITTEN = re.compile(r"<!-- (?P<name>\w+): written by .*?<!-- /(?P=name) -->", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FORMULA = re.compile(r"^ {4}(?! *[-*\d]).*$", re.MULTILINE)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
PART = re.compile(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )|\n(?= *\|)")
MARK = re.compile(r"^(?:[-*]|\d+\.) +")
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)([*)]*)\s+(?=[\"'(*]*(?:[A-Z0-9πΣ_-]|[`\[]))")


class Sentence(NamedTuple):
    """A sentence of `page`, and the one before it in the same paragraph (empty if it is the first)."""

    page: str
    before: str
    text: str


def sentences(page: Path) -> Iterator[Sentence]:
    """All sentences of a page that are long enough to be misread, in order."""
    text = page.read_text("utf-8")
    if GENERATED in text:
        return
    for pattern in (WRITTEN, BLOCK, COMMENT, FORMULA, HEADING):
        text = pattern.sub("\n\n", text)
    for part in PART.split(text):
        line = " ".join(part.split())
        cells = re.split(r"(?<!\\)\|", line.strip("|")) if line.startswith("|") else [line]
        for cell in cells:
            before = ""
            for one in END.sub(r"\1\n", MARK.sub("", cell.strip())).split("\n"):
                if len(one.split()) >= WORDS:
                    yield Sentence(str(page.relative_to(ROOT)), before, one)
                before = one


def sample(seed: int, count: int) -> list[Sentence]:
    """`count` sentences, in the order in which they were drawn."""
    pages = [*documents(), ROOT / "SECURITY.md"]
    return random.Random(seed).sample([one for page in pages for one in sentences(page)], count)


def main() -> None:
    command = argparse.ArgumentParser(description="Sentences of the documentation, at random.")
    command.add_argument("seed", type=int)
    command.add_argument("--count", type=int, default=200)
    given = command.parse_args()
    for number, one in enumerate(sample(given.seed, given.count), 1):
        print(f"{number}. {one.page}\n   ({one.before})\n   {one.text}\n")


if __name__ == "__main__":
    main()
