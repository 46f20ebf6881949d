"""The generated pages are current, and hand-written ones name all that there is."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from dense_reward import AsyncClient, Client
from dense_reward.command_line.arguments import parser
from dense_reward.settings import Settings
from dense_reward_trainer.commands import JOBS

from docs.scripts.blocks import DOCS, ROOT
from docs.scripts.markdown import prose
from docs.scripts.references import pages

GENERATED = pages()


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_a_generated_page_is_current(page: Path) -> None:
    assert page.read_text("utf-8") == GENERATED[page], "run: python -m docs.scripts.references"


def test_every_command_job_and_setting_has_its_place() -> None:
    commands = GENERATED[DOCS / "reference" / "commands.md"]
    for name in parser().subcommands():
        assert f"\n## dense-reward {name}\n" in commands
    for job in JOBS:
        assert f"\n## dense-reward-train {job}\n" in commands
        assert f"\n## {job}\n" in GENERATED[DOCS / "reference" / "recipes.md"]
    for name in Settings.model_fields:
        assert f"`DENSE_REWARD_{name.upper()}`" in GENERATED[DOCS / "reference" / "settings.md"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_page_of_the_client_names_every_method_and_argument_of_a_client(kind: type) -> None:
    page = (DOCS / "client.md").read_text("utf-8")
    methods = {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
    names = methods | set(inspect.signature(kind).parameters)
    assert {name for name in names if not re.search(rf"`[^`]*\b{name}\b[^`]*`", page)} == set()


class _Nav(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python functions."""


_Nav.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav() -> dict[str, list[str]]:
    """The pages of each part of the site."""
    parts = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Nav)["nav"]
    return {name: [path for row in rows for path in row.values()] for part in parts for name, rows in part.items()}


def test_every_page_is_in_the_navigation_and_in_llms_txt_once() -> None:
    shown = [page for pages_ in nav().values() for page in pages_]
    own = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert own - set(shown) == set()
    assert len(shown) == len(set(shown))
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", (DOCS / "llms.txt").read_text("utf-8"), re.MULTILINE)
    assert set(listed) == own
    assert len(listed) == len(set(listed))


def test_a_text_of_the_code_loses_its_markdown_but_not_its_code() -> None:
    assert prose("a_b is `x_*|y`,\n<b> [1|2] _c") == r"a_b is `x_*\|y`, \<b> \[1\|2\] \_c"
