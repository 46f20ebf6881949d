"""Callers that were written for the released document are served as before."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from openapi_compatibility import breaks
from openapi_document import RELEASED, document

CHANGELOG = Path(__file__).parents[4] / "CHANGELOG.md"
ON_PURPOSE: dict[str, str] = {}
"""What breaks, in the words of `breaks`, and the version that breaks it. Empty it when that version is released."""


def test_what_breaks_callers_is_broken_on_purpose_and_in_the_changelog() -> None:
    """After a release: `python tests/support/openapi_document.py --released`."""
    found = breaks(json.loads(RELEASED.read_text("utf-8")), document())
    assert set(found) == set(ON_PURPOSE), "add to ON_PURPOSE, and to CHANGELOG.md under **Breaking in VERSION**"
    written = CHANGELOG.read_text("utf-8")
    assert [version for version in ON_PURPOSE.values() if f"**Breaking in {version}**" not in written] == []


def schemas(changed: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = changed["components"]["schemas"]
    return found


def route_gone(changed: dict[str, Any]) -> None:
    del changed["paths"]["/get_reward"]


def method_gone(changed: dict[str, Any]) -> None:
    del changed["paths"]["/admin/models"]["get"]


def key_needed(changed: dict[str, Any]) -> None:
    changed["paths"]["/health"]["get"]["security"] = [{"key": []}]


def answer_field_gone(changed: dict[str, Any]) -> None:
    del schemas(changed)["ScoreAnswer"]["properties"]["usage"]
    schemas(changed)["ScoreAnswer"]["required"].remove("usage")


def array_gone(changed: dict[str, Any]) -> None:
    del schemas(changed)["ScoredResponse"]["properties"]["varentropy"]


def answer_field_optional(changed: dict[str, Any]) -> None:
    schemas(changed)["ErrorDetails"]["required"].remove("message")


def answer_can_be_null(changed: dict[str, Any]) -> None:
    schemas(changed)["Usage"]["properties"]["scored_tokens"] = {"anyOf": [{"type": "integer"}, {"type": "null"}]}


def request_field_gone(changed: dict[str, Any]) -> None:
    del schemas(changed)["Item"]["properties"]["score_mask"]


def request_field_required(changed: dict[str, Any]) -> None:
    schemas(changed)["ScoreRequest"]["required"] = ["gamma"]


def choice_gone(changed: dict[str, Any]) -> None:
    schemas(changed)["ScoreRequest"]["properties"]["signal"]["enum"].remove("centred")


def bound_lower(changed: dict[str, Any]) -> None:
    schemas(changed)["ScoreRequest"]["properties"]["top_k"]["maximum"] = 10


def parameter_gone(changed: dict[str, Any]) -> None:
    parameters = changed["paths"]["/get_reward"]["post"]["parameters"]
    parameters[:] = [one for one in parameters if one.get("name") != "aggregate"]


def format_gone(changed: dict[str, Any]) -> None:
    del changed["paths"]["/heatmap"]["post"]["responses"]["200"]["content"]["image/svg+xml"]


BREAKING: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (route_gone, "POST /get_reward is gone"),
    (method_gone, "GET /admin/models is gone"),
    (key_needed, "GET /health needs a key"),
    (answer_field_gone, "POST /score 200 application/json.usage is not always there"),
    (array_gone, "POST /score 200 application/json.results[].varentropy is gone"),
    (answer_field_optional, "POST /score 400 application/json.error.message is not always there"),
    (answer_can_be_null, "POST /score 200 application/json.usage.scored_tokens is null, not integer"),
    (request_field_gone, "POST /score request.items[].score_mask is not taken any more"),
    (request_field_required, "POST /score request.gamma is required"),
    (choice_gone, "POST /score request.signal has ['\"centred\"'], not only "),
    (bound_lower, "POST /score request.top_k has maximum 20, not 10"),
    (parameter_gone, "POST /get_reward takes no aggregate any more"),
    (format_gone, "POST /heatmap 200 image/svg+xml is gone"),
]


@pytest.mark.parametrize(("change", "problem"), BREAKING, ids=[change.__name__ for change, _ in BREAKING])
def test_a_break_is_found(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    before = document()
    after = deepcopy(before)
    change(after)
    found = breaks(before, after)
    assert any(one.startswith(problem) for one in found), found


def test_what_is_only_added_breaks_nothing() -> None:
    before = document()
    after = deepcopy(before)
    schemas(after)["ScoreRequest"]["properties"]["new_option"] = {"type": "boolean", "default": False}
    schemas(after)["ScoredResponse"]["properties"]["new_array"] = {"type": "array", "items": {"type": "number"}}
    schemas(after)["Usage"]["required"].append("new_count")
    schemas(after)["Usage"]["properties"]["new_count"] = {"type": "integer"}
    after["paths"]["/new"] = after["paths"]["/models"]
    del after["paths"]["/score"]["post"]["responses"]["408"]
    assert breaks(before, after) == []
