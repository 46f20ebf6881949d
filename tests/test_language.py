"""Plain English: words that readers stumbled over are in no code, help text, error or document."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The word, and what says it plainly.
WORDS = {
    "told": "reported",
    "whoever": "a caller, a user",
    "whomever": "a caller, a user",
    "somebody": "a caller, a user",
    "someone": "a caller, a user",
    "anybody": "any caller, any user",
    "nobody": "no caller, no user",
    "anew": "again",
    "let in": "admitted",
    "written down": "materialised, or recorded",
    "gives it up": "cancels it",
    "give it up": "cancel it",
    "he would": "the caller would",
}
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b".replace(" ", r"\s+"), re.IGNORECASE)
TEST_NAME = re.compile(r"\btest_\w+")
KINDS = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".tpl", ".txt", ".html", ".js", ".css", ".cfg", ".cff", ""}


def stumbles(text: str) -> Iterator[tuple[int, str]]:
    """Line and word; a word may be spread over two lines."""
    text = TEST_NAME.sub("", text)
    for found in PATTERN.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[0].lower().split())


def documents() -> list[Path]:
    """Text files of the project that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files are the project's")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and Path(name).suffix in KINDS]
    return [file for file in files if file.is_file() and file != Path(__file__) and file.name != "LICENSE"]


def test_a_word_is_found_over_two_lines_and_not_in_the_name_of_a_test() -> None:
    text = "is let\n    in here\ndef test_nobody_is_told(): ...\nwritten to disk, told"
    assert list(stumbles(text)) == [(1, "let in"), (4, "told")]


def test_no_file_holds_a_word_that_readers_stumble_over() -> None:
    rows = [
        f"  {file.relative_to(ROOT)}:{line}: {word} ({WORDS[word]})"
        for file in documents()
        for line, word in stumbles(file.read_text("utf-8"))
    ]
    assert not rows, f"{len(rows)} words in the old dialect:\n" + "\n".join(rows)
