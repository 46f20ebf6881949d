"""Requests with the answers that a service gave, recorded from real ones (`make openapi`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "examples.json"


@dataclass(frozen=True, slots=True)
class Example:
    """One request and its answer. `request` is a string if it is not JSON. Requests of errors are not recorded."""

    name: str
    summary: str
    method: str
    path: str
    status: int
    answer: object
    request: object = None
    headers: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"

    @property
    def code(self) -> str | None:
        match self.answer:
            case {"error": {"code": str(code)}}:
                return code
        return None


@cache
def examples() -> tuple[Example, ...]:
    """All examples, in the order of the file."""
    return tuple(Example(**entry) for entry in json.loads(FILE.read_text("utf-8")))
