"""The operators' guide, alerts and dashboard name every metric, alert and setting that exists, and no others."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dense_reward.http.keys import Keys
from dense_reward.settings import Settings, flag
from dense_reward.telemetry.metrics import Metrics, MetricsSnapshot
from monitoring_files import ALERTS, DASHBOARD, GUIDE, METRIC
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def families() -> dict[str, set[str]]:
    """The names of each family's samples, with and without its suffixes."""
    snapshot = MetricsSnapshot(True, 0, 0.0, {}, {})
    found = text_string_to_metric_families(Metrics().render(snapshot).decode())
    suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_sum", "_count"), "gauge": ("",)}
    return {
        family.name: {family.name + suffix for suffix in suffixes[family.type]}
        for family in found
        if family.name.startswith("dense_reward_") and not family.name.endswith("_created")
    }


def test_every_metric_is_explained_and_nothing_else_is(families: dict[str, set[str]]) -> None:
    named = set(METRIC.findall(GUIDE))
    assert named <= set().union(*families.values())
    for name, samples in families.items():
        assert named & samples, f"{name} is not in docs/operations.md"


@pytest.mark.parametrize("file", [ALERTS, DASHBOARD], ids=["alerts", "dashboard"])
def test_what_is_asked_of_prometheus_is_there(families: dict[str, set[str]], file: Path) -> None:
    named = set(METRIC.findall(file.read_text("utf-8")))
    assert len(named) > 5
    assert named <= set().union(*families.values())


def test_the_keys_of_the_guide_are_taken(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(GUIDE.partition("```json\n")[2].partition("```")[0], "utf-8")
    caller = Keys(tmp_path / "keys.json").caller("a-long-random-string")
    assert caller is not None
    assert caller.name == "rl-job"


def alerts() -> dict[str, dict[str, object]]:
    (group,) = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    explained = re.findall(r"^\| (DenseReward[A-Za-z]+) \|", GUIDE, re.MULTILINE)
    assert explained == list(alerts())
    for rule in alerts().values():
        assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
        assert rule["annotations"]


def test_every_setting_that_is_named_exists() -> None:
    flags = {flag(name) for name in Settings.model_fields}
    flags |= {
        f"--no-{name.replace('_', '-')}" for name, field in Settings.model_fields.items() if field.annotation is bool
    }
    files = [GUIDE, ALERTS.read_text("utf-8"), DASHBOARD.read_text("utf-8")]
    named = {name for text in files for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert named <= flags | {"--url-key-file"}  # of `dense-reward score`


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in Settings.model_fields if name.startswith("max_")),
        "api_keys_file",
        "open_metrics",
        "isolate_keys",
        "tls_certificate",
        "tls_private_key",
        "pairs_file",
        "run",
        "checkpoints_folder",
        "results_bytes",
        "drain_s",
        "log_format",
        "otlp_endpoint",
    ],
)
def test_every_setting_of_an_operator_is_explained(name: str) -> None:
    assert flag(name) in GUIDE


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith(".")
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
        assert panel["datasource"]["uid"] == "${datasource}"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is not installed")
def test_every_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path / "alerts.yaml")
    shutil.copy(ROOT / "tests" / "data" / "alerts_test.yaml", tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = yaml.safe_load((tmp_path / "alerts_test.yaml").read_text())["tests"]
    firing = {case["alertname"] for test in tried for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert firing == set(alerts())
