"""The page of HTTP routes, from docs/openapi.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dense_reward.errors import STATUS_BY_CODE

from docs.scripts.markdown import code, page, prose, table

Json = dict[str, Any]
FIRST_ERROR = 400
DOCUMENT = Path(__file__).parents[1] / "openapi.json"
INTRODUCTION = """
Every route of the service. A running service has the same description, with a form to try it, at `/docs`, and as an
OpenAPI document at `/openapi.json`; [openapi.json](../openapi.json) is that document, with examples. Bodies are JSON;
unknown keys are refused. [operations.md](../operations.md#access) says which key a route needs, and
[client.md](../client.md) has the Python client, which does all of this for you.

"""
ERRORS = """
An error has the body `{"error": {"code": ..., "message": ..., ...}}`, with `param` if one field is at fault, and
`items` if several items are. `message` says what was wrong, the limit and the cure.
Retry 429 and 503 after the seconds in `Retry-After`; after any other 4xx, change the request.
"""


def http_page() -> str:
    document = json.loads(DOCUMENT.read_text("utf-8"))
    parts: Json = document["components"]
    used: dict[str, None] = {}
    routes = [
        _route(method, path, operation, parts, used)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if isinstance(operation, dict)
    ]
    bodies = list(_bodies(parts["schemas"], used))
    errors = table(("status", "code"), [(str(status), code(name)) for name, status in STATUS_BY_CODE.items()])
    errors = f"## Errors\n\n{ERRORS.strip()}\n\n{errors}"
    return page("HTTP routes", INTRODUCTION, *routes, errors, "## Bodies" if bodies else "", *bodies)


def _route(method: str, path: str, operation: Json, parts: Json, used: dict[str, None]) -> str:
    text = f"## {method.upper()} {path}\n\n"
    if about := operation.get("description") or operation.get("summary"):
        text += f"{prose(about)}\n\n"
    if parameters := operation.get("parameters"):
        rows = [
            (code(one["name"]), one["in"], _kind(one.get("schema", {}), used), prose(one.get("description", "")))
            for one in (_resolved(parameter, parts["parameters"]) for parameter in parameters)
        ]
        text += table(("parameter", "in", "type", "meaning"), rows) + "\n"
    if body := operation.get("requestBody"):
        text += f"Body: {', '.join(_contents(body, used))}.\n\n"
    answers = operation.get("responses", {})
    bodies = [
        (code(status), ", ".join(_contents(response, used)) or "-", prose(response.get("description", "")))
        for status, response in answers.items()
        if int(status) < FIRST_ERROR
    ]
    errors = [code(status) for status in answers if int(status) >= FIRST_ERROR]
    text += table(("status", "body", "meaning"), bodies)
    return text + (f"\nErrors: {', '.join(errors)}.\n" if errors else "")


def _resolved(parameter: Json, parameters: Json) -> Json:
    reference = parameter.get("$ref")
    found: Json = parameter if reference is None else parameters[reference.rpartition("/")[2]]
    return found


def _contents(part: Json, used: dict[str, None]) -> Iterator[str]:
    for media, content in part.get("content", {}).items():
        kind = _kind(content.get("schema", {}), used)
        yield media if kind == "any" else kind if media == "application/json" else f"{kind} as {media}"


def _bodies(schemas: Json, used: dict[str, None]) -> Iterator[str]:
    """The schemas that routes use, and those that these use."""
    done: set[str] = set()
    while todo := [name for name in used if name not in done]:
        for name in todo:
            done.add(name)
            schema = schemas[name]
            required = schema.get("required", ())
            rows = [
                (code(key) + (" (required)" if key in required else ""), _kind(field, used), _meaning(field))
                for key, field in schema.get("properties", {}).items()
            ]
            about = prose(schema.get("description", ""))
            yield f"### {name}\n\n{about}\n\n{table(('key', 'type', 'meaning'), rows)}"


def _meaning(field: Json) -> str:
    default = f" (default: {field['default']})" if field.get("default") is not None else ""
    return prose(field.get("description", "") + default)


def _kind(schema: Json, used: dict[str, None]) -> str:
    """The type of a value, with links to named schemas."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        used[name] = None
        return f"[{name}](#{name.lower()})"
    for combined in ("anyOf", "oneOf", "allOf"):
        if combined in schema:
            return " or ".join(dict.fromkeys(_kind(one, used) for one in schema[combined]))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "const" in schema:
        return code(str(schema["const"]))
    if schema.get("type") == "array":
        items = schema.get("items") or {"anyOf": schema.get("prefixItems", [{}])}
        return f"list of {_kind(items, used)}"
    return str(schema.get("type", "any"))
