"""The responses of one operation: contents, headers and examples of each status."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from dense_reward.errors import STATUS_BY_CODE
from dense_reward.http.openapi.answers import ErrorAnswer
from dense_reward.http.openapi.examples import Example, examples
from dense_reward.http.openapi.operations import JSON, Content, Operation

Json = dict[str, Any]
HEADERS: Mapping[str, Json] = {
    "X-Request-Id": {
        "description": "The caller's X-Request-Id, or a random one. It is also in the service's log.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds after which to send the request again, if the service knows them.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Server-Timing": {
        "description": "Milliseconds of each stage: encode, queue, compute, describe, total, write.",
        "schema": {"type": "string"},
        "example": "encode;dur=0.21, queue;dur=0.05, compute;dur=4.81, write;dur=0.03",
    },
    "WWW-Authenticate": {"description": "Bearer; Basic for browsers.", "schema": {"type": "string"}},
}
RETRIED = (409, 429, 503)


@dataclass(frozen=True, slots=True)
class Route:
    """An operation at its place. `changed`: statuses that this path changes, and what they become."""

    operation: Operation
    method: str
    path: str
    changed: Mapping[int, int]

    def codes(self) -> Mapping[int, list[str]]:
        """The codes of its errors by status, sorted."""
        found: dict[int, list[str]] = {}
        for code in sorted(self.operation.all_codes):
            status = STATUS_BY_CODE[code]
            found.setdefault(self.changed.get(status, status), []).append(code)
        return dict(sorted(found.items()))

    def examples(self) -> list[Example]:
        """Its requests that were answered."""
        return [one for one in examples() if (one.method, one.path) == (self.method, self.path) and not one.code]

    def responses(self, schemas: Mapping[object, Json]) -> Json:
        """The `responses` of its description. `schemas`: the schema of each type of an answer."""
        operation = self.operation
        answered = {"description": "Answered.", "content": dict(self._contents(operation.answer, schemas, 200))}
        found: Json = {"200": answered | {"headers": _headers(*["Server-Timing"] * operation.computes)}}
        if "*/*" in operation.answer:
            found["304"] = {"description": "The caller's copy is current.", "headers": _headers()}
        if operation.failure:
            contents = dict(self._contents(operation.failure, schemas, 503))
            found["503"] = {"description": "It does not, or not yet.", "content": contents, "headers": _headers()}
        for status, codes in self.codes().items():
            found[str(status)] = _error(status, codes, schemas[ErrorAnswer])
        return found

    def _contents(self, content: Content, schemas: Mapping[object, Json], status: int) -> Iterator[tuple[str, Json]]:
        for media_type, kind in content.items():
            described = {"schema": schemas[kind]}
            found = [one for one in self.examples() if (one.status, one.media_type) == (status, media_type)]
            examples = {one.name: {"summary": one.summary, "value": one.answer} for one in found}
            yield media_type, described | with_examples(examples)


def with_examples(found: Json) -> Json:
    """The key `examples`, if there are any."""
    return {"examples": found} if found else {}


def _error(status: int, codes: list[str], schema: Json) -> Json:
    names = ["Retry-After"] * (status in RETRIED) + ["WWW-Authenticate"] * (status == HTTPStatus.UNAUTHORIZED)
    found = {one.name: {"$ref": f"#/components/examples/{one.name}"} for one in examples() if one.code in codes}
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}.",
        "headers": _headers(*names),
        "content": {JSON: {"schema": schema} | with_examples(found)},
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}
