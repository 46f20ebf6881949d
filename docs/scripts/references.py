"""Generates docs/reference/ from the code. `make docs` runs it; a test checks that what is committed is current.

Commands come from the argument parsers, settings and recipe keys from pydantic's fields, metrics from the registry of
the service, alerts from their file, routes from the OpenAPI document.
"""

import sys
from pathlib import Path

from dense_reward.telemetry.metrics import Metrics

from docs.scripts.commands import commands_page, settings_page
from docs.scripts.keys import recipes_page
from docs.scripts.monitoring import monitoring_page
from docs.scripts.routes import http_page

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, "utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")


def pages() -> dict[Path, str]:
    """Each generated page and its content."""
    alerts = (ROOT / "docker" / "prometheus" / "alerts.yaml").read_text("utf-8")
    return {
        FOLDER / "commands.md": commands_page(),
        FOLDER / "settings.md": settings_page(),
        FOLDER / "recipes.md": recipes_page(),
        FOLDER / "metrics.md": monitoring_page(Metrics(), alerts),
        FOLDER / "http.md": http_page(),
    }


if __name__ == "__main__":
    main()
