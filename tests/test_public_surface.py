"""Names that users and their programs depend on change only on purpose."""

import json
from pathlib import Path

import pytest
from public_surface import public_surface

pytestmark = pytest.mark.slow

KEPT = Path(__file__).parent / "data" / "public_surface.json"


def test_flags_routes_metrics_and_environment_are_those_that_were_published() -> None:
    """After an intended change: `python tests/support/public_surface.py tests/data/public_surface.json`; CHANGELOG."""
    found, kept = public_surface(), json.loads(KEPT.read_text("utf-8"))
    assert found.keys() == kept.keys()
    for kind, names in kept.items():
        assert found[kind] == names, f"{kind} changed"
