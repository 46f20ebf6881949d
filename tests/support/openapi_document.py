"""The OpenAPI document that is published: of a service with keys.

`make openapi` records its examples again, and writes it to docs/openapi.json. With --released, it becomes what later
documents are compared with.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from dense_reward.engines.fake import FakeEngine
from dense_reward.http.app import create_app
from dense_reward.http.openapi.examples import FILE as EXAMPLES
from dense_reward.http.openapi.examples import examples
from dense_reward.serving.service import Service
from dense_reward.settings import Settings
from recorded_examples import ENTRIES, assert_alike, recorded
from running_service import loading

ROOT = Path(__file__).parents[2]
PUBLISHED, RELEASED = ROOT / "docs/openapi.json", ROOT / "tests/data/openapi_released.json"
FOR_PEOPLE = {"description", "summary", "examples", "example", "tags", "info", "operationId"}


@cache
def document(*, with_keys: bool = True) -> dict[str, Any]:
    """The document, as a service answers it."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.json"
        keys.write_text(json.dumps(ENTRIES))
        settings = Settings.model_validate({"api_keys_file": keys} if with_keys else {})
        return create_app(Service(settings, loading(FakeEngine()), lambda: None)).openapi()


def as_text(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def without_texts(node: object) -> object:
    """What programs depend on. `properties` are kept, whatever their names."""
    if isinstance(node, list):
        return [without_texts(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: without_texts(each) for name, each in value.items()}
        if key == "properties"
        else without_texts(value)
        for key, value in node.items()
        if key not in FOR_PEOPLE
    }


def kept_if_alike(now: dict[str, object], before: dict[str, object] | None) -> dict[str, object]:
    """The example as it was, unless it changed in more than times and rounding."""
    try:
        assert_alike(now, before, "")
    except AssertionError:
        return now
    return before or now


if __name__ == "__main__":
    if "--released" in sys.argv:
        RELEASED.write_text(as_text(without_texts(document())), "utf-8")
        sys.exit()
    with tempfile.TemporaryDirectory() as pair:
        before = {one.name: asdict(one) for one in examples()}
        found = [kept_if_alike(asdict(one), before.get(one.name)) for one in recorded(Path(pair))]
    EXAMPLES.write_text(as_text(found), "utf-8")
    examples.cache_clear()
    PUBLISHED.write_text(as_text(document()), "utf-8")
    sys.stdout.write(f"{PUBLISHED}: {len(examples())} examples\n")
