"""Generates files of the chart from other files. `make chart` runs it; tests/deploy/test_chart.py checks its results.

- README.md: readme.in.md plus a table of values from the comments of values.yaml;
- `settings` in values.schema.json: the fields of Settings, except those that the chart sets itself;
- files/alerts.yaml, files/dashboard.json, files/haproxy.cfg: copies from docker/, because a chart cannot read outside
  its folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dense_reward.settings import Settings
from readme import readme

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "dense-reward"
COPIES = {
    CHART / "files" / "alerts.yaml": ROOT / "docker" / "prometheus" / "alerts.yaml",
    CHART / "files" / "dashboard.json": ROOT / "docker" / "grafana" / "dense-reward.json",
    CHART / "files" / "haproxy.cfg": ROOT / "docker" / "haproxy" / "haproxy.cfg",
}
SCHEMA = CHART / "values.schema.json"
# Settings that the templates set: paths of files in a pod, and settings that have their own key in the values.
SET_BY_THE_CHART = frozenset(
    {
        "sft",
        "reference",
        "pairs_file",
        "checkpoints_folder",
        "host",
        "port",
        "api_keys_file",
        "engine_key_file",
        "tls_certificate",
        "tls_private_key",
    }
)
# Settings that have no place in the chart: its values list the pairs.
NOT_IN_THE_CHART = frozenset({"run", "token_head"})
MAX_LINE = 120
KEPT_KEYWORDS = ("type", "enum", "minimum", "maximum", "exclusiveMinimum")


def main() -> None:
    for path, text in chart_files().items():
        path.write_text(text, "utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")


def chart_files() -> dict[Path, str]:
    """Each generated file and its content."""
    copies = {copy: original.read_text("utf-8") for copy, original in COPIES.items()}
    prose, values = (ROOT / "helm" / "readme.in.md").read_text("utf-8"), (CHART / "values.yaml").read_text("utf-8")
    return {**copies, SCHEMA: _schema(), CHART / "README.md": readme(prose, values)}


def _schema() -> str:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return _laid_out(schema) + "\n"


def _laid_out(value: object, indent: int = 0) -> str:
    """JSON in which whatever fits into one line is one line."""
    line = json.dumps(value)
    if not isinstance(value, (dict, list)) or len(line) + indent <= MAX_LINE:
        return line
    inner = " " * (indent + 1)
    if isinstance(value, list):
        lines = [inner + _laid_out(entry, indent + 1) for entry in value]
        return "[\n" + ",\n".join(lines) + "\n" + " " * indent + "]"
    lines = [f"{inner}{json.dumps(key)}: {_laid_out(entry, indent + 1)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def settings_schema() -> dict[str, object]:
    """JSON schema of `settings`. engine and drain_s are required, because templates use them."""
    fields = Settings.model_json_schema()["properties"]
    known = {name: _flat(field) for name, field in fields.items() if name not in SET_BY_THE_CHART | NOT_IN_THE_CHART}
    required = ["engine", "drain_s"]
    return {"type": "object", "additionalProperties": False, "required": required, "properties": known}


def _flat(field: dict[str, Any]) -> dict[str, object]:
    """A field without `anyOf`: Helm's message about a wrong value would list every branch of it."""
    (kind,) = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    flat = {keyword: kind[keyword] for keyword in KEPT_KEYWORDS if keyword in kind}
    if kind["type"] == "integer" and "exclusiveMinimum" in flat:
        flat["minimum"] = flat.pop("exclusiveMinimum") + 1
    if "anyOf" in field:  # null: the service uses its own default
        flat["type"] = [kind["type"], "null"]
        flat |= {"enum": [*kind["enum"], None]} if "enum" in kind else {}
    return {**flat, "description": field["description"]}


if __name__ == "__main__":
    main()
