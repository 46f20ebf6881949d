"""The OpenAPI document, from what FastAPI knows of the routes, the table of operations, and the examples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from dense_reward.http.openapi.answers import ErrorAnswer
from dense_reward.http.openapi.examples import examples
from dense_reward.http.openapi.operations import JSON, OPERATIONS, TAGS, Operation
from dense_reward.http.openapi.responses import HEADERS, Json, Route, with_examples
from dense_reward.schemas import WIRE_VERSION

Statuses = Callable[[str], Mapping[int, int]]
"""The statuses that a path changes, and what they become."""
SCHEME = "key"
DESCRIPTION = """
Rewards for each token of a response: the log-ratio of a finished SFT model and an earlier checkpoint of the same run,
in nats.

- Every error has the same body, `ErrorAnswer`. Its `code` is for programs, its `message` has the cause and the cure.
  A path that does not exist is answered 404 `not_found`, and another method 405 `method_not_allowed`.
- If an answer has the header `Retry-After`, wait for so many seconds and send the request again.
- Bodies are JSON with `Content-Type: application/json`, plain or with `Content-Encoding: gzip`. Unknown keys are
  refused. Answers can get new keys in a later version: ignore those that you do not know.
- Bytes that are no HTTP request are answered 400 in plain text, or the connection is closed.
- The examples are real answers. Their pair is tiny and random, so its rewards mean nothing.
"""
KEY = """
A key of `--api-keys-file`. A client that cannot set this header can put the key into the URL as a password
(http://anything:KEY@host). A service without that file asks for no key, and refuses every request to /admin.
"""
REQUEST_ID, TIMEOUT = "X-Request-Id", "X-Request-Timeout"
PARAMETERS = {
    REQUEST_ID: {
        "name": REQUEST_ID,
        "in": "header",
        "description": "Id of the request, for the answer and the service's log: at most 128 letters, digits and any "
        "of ._:- (another one is replaced).",
        "schema": {"type": "string"},
    },
    TIMEOUT: {
        "name": TIMEOUT,
        "in": "header",
        "description": "Seconds until the answer, if fewer than --max-request-s: 504 after them, or 429 immediately "
        "if the queue alone takes longer.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
}


class _Untitled(GenerateJsonSchema):
    """Without titles: they repeat the names of fields."""

    def field_title_should_be_set(self, _: object) -> bool:
        return False


def document(generated: Json, bodies: Iterable[type[BaseModel]], statuses: Statuses, *, with_keys: bool) -> Json:
    """The document of a service. `generated` is FastAPI's: its paths, docstrings, parameters and request bodies."""
    unknown = {(method.upper(), path) for path, methods in generated["paths"].items() for method in methods}
    if unknown := unknown - OPERATIONS.keys():
        raise KeyError(f"routes without an Operation: {sorted(unknown)}")
    schemas, components = _schemas(bodies)
    paths: dict[str, Json] = {}
    for (method, path), operation in OPERATIONS.items():
        known = generated["paths"].get(path, {}).get(method.lower(), {})
        described = _described(Route(operation, method, path, statuses(path)), known, schemas)
        described["security"] = _security(operation, with_keys=with_keys)
        paths.setdefault(path, {})[method.lower()] = described
    return {
        "openapi": generated["openapi"],
        "info": {
            "title": generated["info"]["title"],
            "version": WIRE_VERSION,
            "description": DESCRIPTION.strip(),
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": HEADERS,
            "parameters": PARAMETERS,
            "examples": {one.name: {"summary": one.summary, "value": one.answer} for one in examples() if one.code},
            "securitySchemes": {SCHEME: {"type": "http", "scheme": "bearer", "description": KEY.strip()}},
        },
    }


def _schemas(bodies: Iterable[type[BaseModel]]) -> tuple[Mapping[object, Json], Json]:
    """The schema of each type of an answer, and all components."""
    operations = OPERATIONS.values()
    contents = [content for operation in operations for content in (operation.answer, operation.failure)]
    answers: set[Any] = {ErrorAnswer, *(kind for content in contents for kind in content.values())}
    inputs: list[Any] = [(kind, "serialization", TypeAdapter(kind)) for kind in answers]
    inputs += [(model, "validation", TypeAdapter(model)) for model in bodies]
    found, definitions = TypeAdapter.json_schemas(
        inputs, ref_template="#/components/schemas/{model}", schema_generator=_Untitled
    )
    components: Json = dict(sorted(definitions["$defs"].items()))
    components["ModelCard"].pop("additionalProperties")  # an answer can get keys
    return {kind: schema for (kind, mode), schema in found.items() if mode == "serialization"}, components


def _described(route: Route, known: Json, schemas: Mapping[object, Json]) -> Json:
    operation = route.operation
    headers = [REQUEST_ID, *[TIMEOUT] * operation.computes]
    described: Json = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description or known["description"],
        "operationId": operation.name,
        "parameters": [
            *known.get("parameters", ()),
            *([_FILE] if "{file}" in route.path else ()),
            *({"$ref": f"#/components/parameters/{name}"} for name in headers),
        ],
        "responses": route.responses(schemas),
    }
    if "requestBody" in known:
        asked = {one.name: {"summary": one.summary, "value": one.request} for one in route.examples()}
        content = known["requestBody"]["content"][JSON] | with_examples(asked)
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    return described


_FILE = {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}, "example": "page.css"}


def _security(operation: Operation, *, with_keys: bool) -> list[Json]:
    """Which key an operation needs, by its right; without keys it needs none."""
    if operation.needs is None:
        return []
    key = {SCHEME: [] if operation.needs == "any key" else [operation.needs]}
    return [key] if with_keys else [{}, key]
