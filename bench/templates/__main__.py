"""Writes bench/results/templates.json and the table of docs/templates.md: `python -m bench.templates`.

The templates are downloaded, or read from `--folder FOLDER`, which has them as REPOSITORY/NAME.jinja (llama.cpp, trl,
vllm, chat_templates). No model is needed. `python -m bench.templates page` only writes the table.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from bench.circumstances import circumstances
from bench.templates import page
from bench.templates.sources import REPOSITORIES, templates
from bench.templates.verdict import verdict_on


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 1 if a chat is served with ids that are not those of its template."""
    parser = argparse.ArgumentParser(prog="python -m bench.templates", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["page"], help="page: only write the table of docs/templates.md")
    parser.add_argument("--folder", type=Path, help="where the templates lie")
    options = parser.parse_args(arguments)
    different = 0 if options.command == "page" else _measure(options.folder)
    page.write()
    return int(different > 0)


def _measure(folder: Path | None) -> int:
    """Write the results; returns the number of chats with wrong ids."""
    rows, different = [], 0
    for template in templates(folder):
        verdict = verdict_on(template.source, spaced=template.spaced)
        rows.append({"repository": template.repository, "name": template.name, **asdict(verdict)})
        for chat in verdict.different:
            different += 1
            print(f"{template.repository}/{template.name}: DIFFERENT: {chat}")
    print(dict(Counter(str(row["verdict"]) for row in rows)), f"{different} chats with other ids")
    repositories = {repository.name: repository.commit for repository in REPOSITORIES}
    today = date.today().isoformat()  # noqa: DTZ011 - the day of the measurement
    result = {**circumstances(), "date": today, "repositories": repositories, "templates": rows}
    page.RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return different


if __name__ == "__main__":
    sys.exit(main())
