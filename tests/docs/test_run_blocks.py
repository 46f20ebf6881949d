"""`make docs` notices a block that fails, and hands a block the URL of its service."""

from pathlib import Path

import pytest

from docs.scripts.blocks import DOCS, Block
from docs.scripts.run_blocks import Outcome, run, run_page


def block(language: str, text: str) -> Block:
    return Block(DOCS / "x.md", 7, language, text, None)


@pytest.mark.parametrize(
    ("language", "text", "fault"),
    [
        ("sh", "ls | grep no_such_file", "exit code 1"),
        ("sh", "echo out; false; echo more", "exit code 1\nout"),
        ("sh", "echo $UNSET", "unbound variable"),
        ("python", "print('out')\n1 / 0", "ZeroDivisionError"),
        ("python", "raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_block_that_fails_is_a_fault_with_its_place_and_output(language: str, text: str, fault: str) -> None:
    (found,) = run(block(language, text), "http://127.0.0.1:1", {})
    assert fault in found
    assert "docs/x.md:7" in found


def test_a_block_gets_the_url_of_the_service_and_the_names_of_blocks_before_it() -> None:
    names: dict[str, object] = {}
    assert run(block("python", "url = 'http://localhost:8000/score'"), "http://h:1", names) == []
    assert run(block("python", "assert url == 'http://h:1/score'"), "http://h:1", names) == []
    assert run(block("sh", '[ "http://127.0.0.1:8000" = "http://h:""1" ]'), "http://h:1", names) == []


def test_a_page_counts_what_was_run_what_failed_and_what_was_only_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("docs.scripts.run_blocks.GIVEN", "")
    monkeypatch.setattr("docs.scripts.blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntrue\n```\n```sh\nfalse\n```\n```json\n{}\n```\n<!-- not run: a reason -->\n```python\n1 / 0\n```\n"
        "<!-- not run: a reason -->\n```sh\ndense-reward serve --prot 1\n```\n"
    )
    outcome = Outcome()
    run_page(page, "http://h:1", outcome)
    assert outcome == Outcome(run=2, failed=2, checked_only=3)
