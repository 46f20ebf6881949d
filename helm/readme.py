"""Generates the chart's README.md: prose, and a table from the comments of values.yaml. Pure; needs only pyyaml.

A line `## Title` starts a section. The comment above a key, up to the nearest empty line, describes it. A mapping over
several lines gets a row only if it has a comment; every other key is a value and must have one.
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
    """A value: its dotted path, its default as JSON, and its description."""

    section: str
    path: str
    default: str
    text: str


def readme(prose: str, values: str) -> str:
    """The README's text. Raises ValueError if the prose has no place for the table, or a value has no comment."""
    if prose.count(PLACE) != 1:
        raise ValueError(f"readme.in.md must contain the line {PLACE.strip()} once, not {prose.count(PLACE)} times")
    return prose.replace(PLACE, "\n".join(_tables(values)) + "\n")


def _tables(values: str) -> Iterator[str]:
    section = None
    for row in rows(values):
        if row.section != section:
            if section is not None:
                yield ""
            section = row.section
            yield from (f"### {section}", "", "| value | default | description |", "|---|---|---|")
        yield f"| `{row.path}` | `{row.default}` | {row.text} |"


def rows(values: str) -> list[Row]:
    """All values of a values.yaml, in the file's order."""
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
        raise ValueError(f"values.yaml: {path} has no comment: describe it in the line above the key")
    return Row(section, path, default, " ".join(comment).replace("|", "\\|"))


def _at(values: object, path: str) -> object:
    for name in path.split("."):
        if not isinstance(values, dict):
            raise ValueError(f"values.yaml: no value {path}, which the indentation implies: correct the indentation")
        values = values[name]
    return values
