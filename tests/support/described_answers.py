"""Holds real answers to the OpenAPI document: status, media type, and the exact keys and types of the body."""

import re
from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from typing import Any

import httpx2
from dense_reward.http.openapi.answers import ErrorAnswer
from dense_reward.http.openapi.operations import JSON, OPERATIONS
from dense_reward.http.openapi.responses import Route
from dense_reward.http.statuses import expected
from pydantic import TypeAdapter

UNROUTED = {"not_found", "method_not_allowed", "unauthorized", "forbidden", "rate_limited"}


def hold(response: httpx2.Response) -> None:
    """Fails if the document does not describe this answer of a service."""
    response.read()
    method, path, status = response.request.method, response.request.url.path, response.status_code
    route, place = route_of(method, path), f"{method} {path}: {status}: {response.content[:300]!r}"
    kind = response.headers.get("content-type", "").partition(";")[0]
    if method == "HEAD":
        return
    if route is None:
        assert error_code(response) in UNROUTED, place
        return
    is_file = "*/*" in route.operation.answer
    contents = {200: route.operation.answer, 503: route.operation.failure}.get(status, {})
    if status == HTTPStatus.NOT_MODIFIED:
        assert is_file, place
    elif kind == JSON and kind in contents:
        strictly(contents[kind], response.content, place)
    elif kind not in contents and not (is_file and contents):
        assert error_code(response) in route.codes().get(status, ()), place


def error_code(response: httpx2.Response) -> str:
    strictly(ErrorAnswer, response.content, str(response.request.url))
    code: str = response.json()["error"]["code"]
    return code


def strictly(kind: object, body: bytes, place: str) -> None:
    """Fails for a key or type that the document does not have."""
    try:
        adapter_of(kind).validate_json(body, strict=True, extra="forbid")
    except ValueError as error:
        raise AssertionError(f"{place}: {error}") from None


@cache
def adapter_of(kind: Any) -> TypeAdapter[object]:  # noqa: ANN401 - a type form, which no annotation names yet
    return TypeAdapter(kind)


def route_of(method: str, path: str) -> Route | None:
    """The operation of a request; that of a path without variables comes first."""
    found = list(_matching(method, path))
    return min(found, key=lambda route: route.path.count("{"), default=None)


def _matching(method: str, path: str) -> Iterator[Route]:
    for (its_method, template), operation in OPERATIONS.items():
        if method == its_method and _pattern(template).fullmatch(path):
            yield Route(operation, method, template, expected(template))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)))
