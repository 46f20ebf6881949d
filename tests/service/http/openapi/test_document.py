"""The OpenAPI document: every route is in it, with types, errors, keys and examples."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from dense_reward.errors import STATUS_BY_CODE
from dense_reward.http.app import create_app
from dense_reward.http.openapi.answers import ErrorAnswer
from dense_reward.http.openapi.examples import examples
from dense_reward.http.openapi.operations import JSON, OPERATIONS, TAGS, Operation
from described_answers import UNROUTED, strictly
from openapi_document import PUBLISHED, as_text, document
from running_service import served
from starlette.routing import Mount, Route

OK, UNAVAILABLE = 200, 503


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_the_published_document_is_current() -> None:
    assert PUBLISHED.read_text("utf-8") == as_text(document()), "make openapi"


def test_every_route_of_the_service_is_described_and_no_other() -> None:
    with served(ready=False) as running:
        routes = create_app(running.service).routes
    plain = [route for route in routes if isinstance(route, Route)]
    found = {(method, route.path) for route in plain for method in {*(route.methods or ())} - {"HEAD"}}
    found |= {("GET", route.path + "/{file}") for route in routes if isinstance(route, Mount)}
    assert found == OPERATIONS.keys() == {(method, path) for method, path, _ in operations()}


def test_a_service_answers_this_document_and_asks_for_keys_only_if_it_has_some() -> None:
    with served(ready=False) as running:
        answered = running.client.get("/openapi.json").json()
    assert answered == document(with_keys=False)
    assert answered["components"] == document()["components"], "the scheme is described either way"
    for method, path, operation in operations():
        optional = answered["paths"][path][method.lower()]["security"]
        key = [{"key": [needs] if needs != "any key" else []}] if (needs := OPERATIONS[method, path].needs) else []
        assert (operation["security"], optional) == (key, [{}, *key] if key else []), path


def test_each_operation_has_a_name_a_tag_a_summary_and_a_sentence() -> None:
    found = list(operations())
    assert len({operation["operationId"] for _, _, operation in found}) == len(found)
    assert {tag for _, _, operation in found for tag in operation["tags"]} == set(TAGS)
    for _, path, operation in found:
        assert operation["summary"], path
        assert operation["description"].endswith("."), path


def test_every_error_of_the_service_is_one_of_an_operation() -> None:
    known = {code for operation in OPERATIONS.values() for code in operation.all_codes}
    assert known | UNROUTED == set(STATUS_BY_CODE)


def contents() -> Iterator[tuple[Operation, int, str, dict[str, Any]]]:
    """Each content of each answer: its operation, status and media type, and its description."""
    for method, path, operation in operations():
        for status, answer in operation["responses"].items():
            for kind, content in answer.get("content", {}).items():
                yield OPERATIONS[method, path], int(status), kind, content


def test_every_json_answer_and_every_error_has_examples_of_its_type() -> None:
    shared = document()["components"]["examples"]
    for operation, status, kind, content in contents():
        if kind != JSON or operation.name == "openapi" or (status == UNAVAILABLE and operation.failure):
            continue
        place = f"{operation.name} {status}"
        assert content["examples"], place
        for one in content["examples"].values():
            value = shared[one["$ref"].rpartition("/")[2]]["value"] if "$ref" in one else one["value"]
            strictly(operation.answer[kind] if status == OK else ErrorAnswer, json.dumps(value).encode(), place)


def test_examples_stand_where_they_belong() -> None:
    for one in examples():
        operation = OPERATIONS[one.method, one.path]
        assert one.code in operation.all_codes if one.code else one.status == 200, one.name
    assert len({one.name for one in examples()}) == len(examples())


def test_text_of_the_document_is_plain() -> None:
    texts = re.findall(r'"(?:description|summary)": "([^"]+)"', as_text(document()))
    assert [text for text in texts if re.search(r"TODO|\bNone\b", text)] == []


@pytest.mark.parametrize("kind", ["unknown key", "missing key", "wrong type"])
def test_an_answer_that_is_not_as_described_is_noticed(kind: str) -> None:
    answer = next(one for one in examples() if one.name == "responses").answer
    assert isinstance(answer, dict)
    usage = answer["usage"]
    assert isinstance(usage, dict)
    changed = {
        "unknown key": usage | {"cost": 1},
        "missing key": {"prompt_tokens": 1},
        "wrong type": usage | {"scored_tokens": "6"},
    }[kind]
    with pytest.raises(AssertionError, match="usage"):
        strictly(OPERATIONS["POST", "/score"].answer[JSON], json.dumps(answer | {"usage": changed}).encode(), "")
