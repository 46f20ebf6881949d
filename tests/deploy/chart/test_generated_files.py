"""The chart's generated files, compared with their sources."""

import json
import re
from pathlib import Path

import pytest
import yaml
from chart_files import SET_BY_THE_CHART, chart_files
from dense_reward.settings import ENV_PREFIX, Settings, env_name
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.recipe_files import recipe_names
from readme import PLACE, readme, rows

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "dense-reward"


@pytest.mark.parametrize("path", chart_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_that_follows_from_others_follows_from_them(path: Path) -> None:
    assert path.read_text("utf-8") == chart_files()[path], "run `make chart`"


def test_the_chart_is_of_the_projects_version() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert project is not None
    assert yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"] == project[1]


def test_every_environment_name_in_the_chart_is_a_setting_and_every_path_is_given() -> None:
    """Searches the templates' text, which also has names that no values of these tests render."""
    templates = [path for path in (CHART / "templates").rglob("*") if path.suffix in {".yaml", ".tpl"}]
    text = "\n".join(re.sub(r"\{\{-? ?/\*.*?\*/", "", path.read_text("utf-8"), flags=re.DOTALL) for path in templates)
    named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]+\b", text)) - {ENV_PREFIX}
    assert named == {env_name(name) for name in SET_BY_THE_CHART}
    assert set(Settings.model_fields) >= SET_BY_THE_CHART


def test_the_chart_knows_the_jobs_of_the_trainer() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert set(schema["definitions"]["trainerJob"]["properties"]["job"]["enum"]) == set(JOBS)


def test_examples_name_recipes_that_are_shipped() -> None:
    texts = [path.read_text("utf-8") for path in (CHART / "examples").glob("*.yaml")]
    named = {recipe for text in texts for recipe in re.findall(r"recipe: (\S+)", text)}
    assert named
    assert named <= set(recipe_names())


def test_every_value_is_in_the_table_with_its_default_and_its_comment() -> None:
    one = "## One\n\n# The first.\n# Of two lines.\na: 1\n\n"
    values = one + "## Two\n\nb:\n  # A list | of words.\n  c: [x]\n  # Empty.\n  d: {}\n"
    assert [(row.section, row.path, row.default, row.text) for row in rows(values)] == [
        ("One", "a", "1", "The first. Of two lines."),
        ("Two", "b.c", '["x"]', "A list \\| of words."),
        ("Two", "b.d", "{}", "Empty."),
    ]
    assert readme(f"Prose.\n\n{PLACE}End.\n", values).startswith("Prose.\n\n")


@pytest.mark.parametrize("values", ["a: 1\n", "# Said.\na:\n  b: 1\n", "# Said.\n\na: 1\n", "a: {b: 1}\n"])
def test_a_value_without_a_comment_is_refused(values: str) -> None:
    with pytest.raises(ValueError, match="has no comment"):
        readme(PLACE, values)


def test_prose_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="once, not 0 times"):
        readme("Prose.\n", "# Said.\na: 1\n")
