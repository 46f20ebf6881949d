"""README.md of the chart: prose, and a table of values from the comments of values.yaml. Pure; needs pyyaml alone.

A line `## Title` begins a section. The comment above a key, up to the nearest empty line, describes it. A mapping over
several lines gets a row where it has a comment; everything else is a value and needs one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

PLACE = "<!-- values -->\n"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_][\w-]*):(?P<rest>.*)$")


@dataclass(frozen=True, slots=True)
class Row:
    """A value: its dotted path, its default as JSON, and what is said of it."""

    section: str
    path: str
    default: str
    text: str


def readme(prose: str, values: str) -> str:
    """Raises ValueError where the prose has no place for the table, or a value no comment."""
    if prose.count(PLACE) != 1:
        raise ValueError(f"the prose needs one line {PLACE.strip()}")
    return prose.replace(PLACE, "\n".join(_tables(values)) + "\n")


def _tables(values: str) -> Iterator[str]:
    section = None
    for row in rows(values):
        if row.section != section:
            if section is not None:
                yield ""
            section = row.section
            yield from (f"### {section}", "", "| value | default | |", "|---|---|---|")
        yield f"| `{row.path}` | `{row.default}` | {row.text} |"


def rows(values: str) -> list[Row]:
    """Every value of a values.yaml, in its order."""
    defaults = yaml.safe_load(values)
    found: list[Row] = []
    section, comment, above = "", list[str](), list[tuple[int, str]]()
    for line in values.splitlines():
        stripped = line.strip()
        key = _KEY.match(line)
        if stripped.startswith("## "):
            section, comment = stripped.removeprefix("## "), []
        elif stripped.startswith("#"):
            comment.append(stripped.removeprefix("#").strip())
        elif key is None:
            comment = []
        else:
            indent = len(key["indent"])
            above = [*(entry for entry in above if entry[0] < indent), (indent, key["key"])]
            path = ".".join(name for _, name in above)
            default = _at(defaults, path)
            has_own = isinstance(default, dict) and bool(default) and not key["rest"].strip()
            if comment or not has_own:
                found.append(_row(section, path, "{...}" if has_own else json.dumps(default), comment))
            comment = []
    return found


def _row(section: str, path: str, default: str, comment: list[str]) -> Row:
    if not comment:
        raise ValueError(f"values.yaml: {path} has no comment")
    return Row(section, path, default, " ".join(comment).replace("|", "\\|"))


def _at(values: object, path: str) -> object:
    for name in path.split("."):
        if not isinstance(values, dict):
            raise ValueError(f"values.yaml: {path} is not where its indentation says")
        values = values[name]
    return values
