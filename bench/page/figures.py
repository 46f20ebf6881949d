"""The file of figures that `make page` and `make docs` share."""

import json
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "page.json"


def write_figures(figures: Mapping[str, object]) -> None:
    """Adds figures to the file, and keeps those of the other command."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, **figures}, indent=1) + "\n")
