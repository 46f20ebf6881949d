"""The chart's files beside those that they follow from, and what `helm test` runs, run against the real service."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import yaml
from dense_reward import Client
from dense_reward.settings import ENV_PREFIX, Settings, twin
from dense_reward_trainer.cli import JOBS
from dense_reward_trainer.config import recipe_names
from served import Served, served

sys.path.append(str(Path(__file__).parent.parent / "helm"))  # no part of the distribution
sys.path.append(str(Path(__file__).parent.parent / "helm" / "dense-reward" / "files"))

import ask
from chart_files import SET_BY_THE_CHART, chart_files
from readme import PLACE, readme, rows

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "dense-reward"
ASK = CHART / "files" / "ask.py"
KEY = "a-key-of-the-test-of-the-chart"


@pytest.mark.parametrize("path", chart_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_that_follows_from_others_follows_from_them(path: Path) -> None:
    assert path.read_text("utf-8") == chart_files()[path], "run `make chart`"


def test_the_chart_is_of_the_projects_version() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert project is not None
    assert yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"] == project[1]


def test_every_environment_name_in_the_chart_is_a_setting_and_every_path_is_given() -> None:
    """In the text of the templates, where a name could stand that no values render."""
    text = "\n".join(path.read_text("utf-8") for path in (CHART / "templates").rglob("*.yaml"))
    named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]+\b", text)) - {ENV_PREFIX}
    assert named == {twin(name) for name in SET_BY_THE_CHART}
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
    with pytest.raises(ValueError, match="one line"):
        readme("Prose.\n", "# Said.\na: 1\n")


def asking(running: Served, patience_s: int = 20, key: str | None = None) -> "subprocess.CompletedProcess[str]":
    """`helm test`'s command against a service."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    if key is not None:
        environment["REWARD_KEY"] = key
    command: Sequence[str] = [sys.executable, str(ASK), str(running.client.base_url), str(patience_s)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_test_passes_against_a_service_that_answers_as_it_must() -> None:
    with served() as running:
        done = asking(running)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^default: \d+ rewards, ", done.stdout, re.MULTILINE)) == 2


def test_the_test_asks_with_its_key_and_fails_without(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "test", "key": KEY, "rights": ["score"]}]))
    with served(api_keys_file=keys) as running:
        assert asking(running, key=KEY).returncode == 0
        refused = asking(running)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "unauthorized" in refused.stderr.lower()


def test_the_test_fails_where_nobody_answers() -> None:
    with served() as running:
        pass
    assert asking(running, patience_s=1).returncode != 0


@pytest.mark.parametrize("wrong", ["reward", "sft_logprob"])
def test_the_test_fails_where_rewards_are_not_the_differences_of_log_probs(wrong: str) -> None:
    """Between client and service stands somebody who changes one number."""
    with served() as running:

        def forward(request: httpx.Request) -> httpx.Response:
            headers = {"content-type": "application/json"}
            answer = running.client.post(request.url.path, content=request.content, headers=headers).json()
            for result in answer["results"]:
                result[wrong][-1] += 0.5
            return httpx.Response(200, json=answer)

        transport = httpx.MockTransport(forward)
        with (
            Client("http://between", encoding="float", transport=transport) as client,
            pytest.raises(SystemExit) as ended,
        ):
            ask.check(client, "default")
    assert "differences" in str(ended.value)
