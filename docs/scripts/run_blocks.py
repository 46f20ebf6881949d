"""Runs the code blocks of the documents, in the order of each page, against a real served run of tiny models.

`make docs` runs it. Blocks of a page share a folder, and its Python blocks share their names. Writes `blocks_run`,
`blocks_failed` and `blocks_checked_only` to bench/results/page.json.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from bench.circumstances import circumstances
from bench.page.figures import write_figures
from docs.scripts.blocks import Block, blocks_of, documents
from docs.scripts.checks import faults
from docs.scripts.served_files import user_environment, user_folder

URLS = ("http://127.0.0.1:8000", "http://localhost:8000")
LIMIT_S = 300
RUNNABLE = {"sh", "python"}
GIVEN = """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("runs/demo/checkpoints/sft")
prompt_ids = tokenizer.encode("Add 2 and 3.")
response_ids = responses_ids = [tokenizer.encode("2+3=5"), tokenizer.encode("2+3=6 or so")]
rows = [{"prompt": prompt_ids, "response": ids} for ids in response_ids]
"""
"""What the text of some pages gives: the tokenizer and ids of a user's own program."""


@dataclass(slots=True)
class Outcome:
    """How many blocks were run, how many of these failed, and how many were only checked."""

    run: int = 0
    failed: int = 0
    checked_only: int = 0

    def figures(self) -> dict[str, int]:
        return {"blocks_run": self.run, "blocks_failed": self.failed, "blocks_checked_only": self.checked_only}


def main() -> int:
    """Returns exit code 1 if a block failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="only these pages; the results are then not written")
    pages = [page.resolve() for page in parser.parse_args().pages]
    outcome = Outcome()
    where = circumstances()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, user_folder(Path(name)) as url:
        os.chdir(name)
        for page in pages or documents():
            run_page(page, url, outcome)
        os.chdir("/")
    print(json.dumps(outcome.figures()))
    if not pages:
        write(outcome, where)
    return 1 if outcome.failed else 0


def write(outcome: Outcome, where: dict[str, object]) -> None:
    """Adds the figures to those of `make page`, whose commit and machine stay beside them."""
    write_figures({**outcome.figures(), "blocks_at": where["commit"]})


def run_page(page: Path, url: str, outcome: Outcome) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    exec(GIVEN, names)
    for block in blocks_of(page):
        found = faults(block)
        if block.reason is not None or block.language not in RUNNABLE:
            outcome.checked_only += 1
        else:
            outcome.run += 1
            began_s = time.monotonic()
            found = found or run(block, url, names)
            print(f"{block.place}: {time.monotonic() - began_s:.1f} s", flush=True)
        outcome.failed += bool(found)
        for fault in found:
            print(f"FAILED {fault}", flush=True)


def run(block: Block, url: str, names: dict[str, object]) -> list[str]:
    """What went wrong, in an empty or one-element list."""
    text = block.text
    for usual in URLS:
        text = text.replace(usual, url)
    return _run_python(block, text, names) if block.language == "python" else _run_sh(block, text)


def _run_python(block: Block, text: str, names: dict[str, object]) -> list[str]:
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            exec(compile(text, block.place, "exec"), names)
    except BaseException:
        return [f"{block.place}:\n{printed.getvalue()[-2000:]}{traceback.format_exc()}"]
    return []


def _run_sh(block: Block, text: str) -> list[str]:
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        command, env=user_environment(Path.cwd()), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return (
        []
        if done.returncode == 0
        else [f"{block.place}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"]
    )


if __name__ == "__main__":
    sys.exit(main())
