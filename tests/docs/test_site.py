"""Staging keeps every link of the pages working on the site. Needs no Zensical: `make docs` builds the site with it."""

from pathlib import Path

import pytest

from docs.scripts.site import Staged, decisions, file_page, page_text

PAGES = {"docs/a.md": "a.md", "docs/how/b.md": "how/b.md", "README.md": "readme.md"}


@pytest.mark.parametrize(
    ("source", "link", "target"),
    [
        ("docs/a.md", "how/b.md#there", "how/b.md#there"),
        ("docs/how/b.md", "../a.md", "../a.md"),
        ("README.md", "docs/how/b.md", "how/b.md"),
        ("docs/a.md", "#here", "#here"),
        ("docs/a.md", "https://example.org/", "https://example.org/"),
        ("docs/a.md", "pictures/heatmap.png", "pictures/heatmap.png"),
        ("docs/how/b.md", "../../Makefile", "../files/Makefile.md"),
        ("docs/a.md", "../.github/workflows/ci.yaml", "files/github/workflows/ci.yaml.md"),
        ("docs/a.md", "../bench/results/page.json", "files/bench/results/page.json"),
        ("docs/a.md", "decisions", "decisions/index.md"),
    ],
)
def test_a_link_leads_to_the_same_thing_on_the_site(source: str, link: str, target: str) -> None:
    assert Staged(dict(PAGES)).target(source, link) == target


def test_a_link_to_nothing_stops_the_build() -> None:
    with pytest.raises(ValueError, match=r"docs/a\.md: no/such\.md leads nowhere"):
        Staged(dict(PAGES)).target("docs/a.md", "no/such.md")


def test_links_in_code_stay_and_a_list_gets_the_empty_line_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("docs.scripts.site.ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "x.py").write_text("print()\n")
    (tmp_path / "docs" / "a.md").write_text("See [x](../x.py):\n- one\n- two\n\n```text\n[x](../x.py)\n- a\n```\n")
    staged = Staged({"docs/a.md": "a.md"})
    text = page_text(staged, "docs/a.md")
    assert text == "See [x](files/x.py.md):\n\n- one\n- two\n\n```text\n[x](../x.py)\n- a\n```\n"
    assert file_page("x.py").endswith("````python\nprint()\n````\n")


def test_the_list_of_decisions_has_their_titles() -> None:
    assert "- [0027: " in decisions()
