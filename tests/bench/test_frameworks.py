"""What could not be fetched or installed is a row with the reason, not the end of `make test-frameworks`."""

from pathlib import Path

import pytest

from bench import framework_sources, frameworks
from bench.framework_sources import SOURCES, Source, fetched

ROOT = Path(__file__).parents[2]


def test_a_copy_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Source("one", "1.0", "its code")
    monkeypatch.setenv(source.variable, str(tmp_path))
    assert fetched(source) == tmp_path


@pytest.mark.parametrize("repository", [None, "/nowhere"], ids=["wheel", "commit"])
def test_a_source_that_cannot_be_fetched_is_a_row_with_the_reason(
    repository: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(framework_sources, "FOLDER", tmp_path / "sources")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    row = frameworks.driven_from_source(Source("no-such-program", "1.0", "its code", repository), {})
    assert (row.name, row.version, row.passed, row.failed) == ("no-such-program", "1.0", 0, 0)
    assert row.error
    assert not list((tmp_path / "sources").iterdir()), "a later run would take half a copy for the source"


def test_an_environment_that_was_not_made_is_a_row_with_the_reason(tmp_path: Path) -> None:
    row = frameworks.tried("one", "1.0", "its code", lambda: frameworks.driven("one", tmp_path / "python", "", []))
    assert row.error is not None
    assert str(tmp_path / "python") in row.error


def test_every_program_has_its_tests() -> None:
    assert all((ROOT / source.tests).is_file() for source in SOURCES)
