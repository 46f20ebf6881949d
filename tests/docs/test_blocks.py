"""Code blocks of the documents parse, and their commands, flags and recipe keys exist. `make docs` also runs them."""

from pathlib import Path

import pytest

from docs.scripts.blocks import DOCS, Block, blocks_of, documents
from docs.scripts.checks import faults

PAGES = documents()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_is_right_as_far_as_that_shows_without_running_it(page: Path) -> None:
    assert [fault for block in blocks_of(page) for fault in faults(block)] == []


@pytest.mark.parametrize(
    ("language", "text", "fault"),
    [
        ("sh", "dense-reward serve --refrence runs/a", "--refrence"),
        ("sh", "dense-reward serve --port many", "port"),
        ("sh", "KEY=1\nls && dense-reward-train sft sft_full batchsize=3", "did you mean batch_size"),
        ("sh", "make dose", "no target dose"),
        ("sh", "echo 'open", "unexpected EOF"),
        ("python", "client.score(", "was never closed"),
        ("json", "{'a': 1}", "double quotes"),
        ("yaml", "a: [1", "expected"),
        ("ini", "[Service]\nExecStart=/opt/bin/dense-reward serve --sfd /a", "--sfd"),
        ("", "anything", "no language"),
    ],
)
def test_a_wrong_block_is_noticed(language: str, text: str, fault: str) -> None:
    (found,) = faults(Block(DOCS / "x.md", 1, language, text, None))
    assert fault in found


def test_a_reason_is_read_from_the_comment_above_a_block_or_follows_from_its_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs\na GPU -->\n```python\n1\n```\n```python\n2\n```\n```text\nout\n```\n"
        "```sh\nmake docs\n```\n  ```sh\n  ls\n  ```\n"
    )
    found = [(block.text, block.reason) for block in blocks_of(page)]
    assert [text for text, _ in found] == ["1\n", "2\n", "make docs\n", "ls\n"]
    assert [reason for _, reason in found[::3]] == ["needs a GPU", None]
    assert found[2][1] is not None
