"""The code blocks of the documents. Each is run, or there is a reason why it is only checked.

The reason is a comment above the block, `<!-- not run: REASON -->`, or follows from its commands (REASONS).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HISTORY = {DOCS / "log.md"}
OUTPUT = {"text"}
"""The language of blocks that are no code."""
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```\s*?$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
REASONS = (
    (r"^ *make |\bbench\.", "a target of the Makefile or a measurement: minutes to hours"),
    (r"\b(docker|helm|kubectl|sky|sbatch|vllm|torchrun|pip|ray|rsync)\b", "needs a program, machine or network"),
    (r"\b(DIR|HOST|KEY|SFT|REFERENCE|CONFIG|FILE|OWNER)\b|path/to", "has placeholders"),
    (
        r"\b(arithmetic|demo|gsm8k|judge)_\w+|\b\w+_full\b(?!.*device=cpu)|estimators",
        "trains or samples for minutes, or on a GPU",
    ),
)
"""Commands that are not run, and why."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a page. `reason`: why it is not run; None: it is run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """All pages whose code is held to be right. Decisions and the log keep old commands."""
    own = {page for page in DOCS.rglob("*.md") if DOCS / "decisions" not in page.parents}
    others = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "helm" / "dense-reward" / "README.md"}
    return sorted((own | others) - HISTORY)


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of code, and those without a language, which are a fault."""
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] in OUTPUT:
            continue
        marked = NOT_RUN.search(text[: found.start()])
        indent = re.compile(rf"^ {{{len(found['indent'])}}}", re.MULTILINE)
        line = text.count("\n", 0, found.start()) + 1
        reason = " ".join(marked["reason"].split()) if marked else _reason(found["language"], found["text"])
        yield Block(page, line, found["language"], indent.sub("", found["text"]), reason)


def _reason(language: str, text: str) -> str | None:
    if language != "sh":
        return None
    return next((reason for pattern, reason in REASONS if re.search(pattern, text, re.MULTILINE | re.DOTALL)), None)
