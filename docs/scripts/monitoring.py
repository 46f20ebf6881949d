"""The page of metrics and alerts."""

import yaml
from dense_reward.telemetry.metrics import Metrics
from prometheus_client import Counter, Gauge, Histogram

from docs.scripts.markdown import code, page, prose, table

INTRODUCTION = """
What `/metrics` serves, in Prometheus' text format, and the alerts that
[alerts.yaml](../../docker/prometheus/alerts.yaml) raises.
[operations.md](../operations.md#alerts) says what to do when one fires.
"""
PROCESS = """
`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds` and other standard metrics of the
process come from prometheus-client.
"""


def monitoring_page(metrics: Metrics, alerts: str) -> str:
    """The metrics of a service, and the alerts of a rules file."""
    rows = [
        (code(_name(metric)), metric._type, prose(", ".join(metric._labelnames) or "-"), prose(metric._documentation))
        for metric in vars(metrics).values()
        if isinstance(metric, Counter | Gauge | Histogram)
    ]
    rules = [rule for group in yaml.safe_load(alerts)["groups"] for rule in group["rules"]]
    return page(
        "Metrics and alerts",
        INTRODUCTION,
        "## Metrics\n\n" + table(("metric", "type", "labels", "meaning"), sorted(rows)),
        PROCESS,
        "## Alerts\n\n" + table(("alert", "severity", "for", "fires if"), [_alert(rule) for rule in rules]),
    )


def _name(metric: Counter | Gauge | Histogram) -> str:
    return f"{metric._name}_total" if isinstance(metric, Counter) else metric._name


def _alert(rule: dict[str, object]) -> tuple[str, str, str, str]:
    labels = rule["labels"]
    assert isinstance(labels, dict)
    expression = " ".join(str(rule["expr"]).split())
    return code(str(rule["alert"])), str(labels["severity"]), str(rule.get("for", "at once")), code(expression)
