"""The chart's objects for Prometheus, and the metric that it scales on."""

import json
import re

import pytest
import yaml
from rendered_chart import EXAMPLES, ROOT, Object, example, of_kind, render, the

ALERTS = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yaml").read_text("utf-8"))
ON = {"enabled": True}


def rules(alerts: Object) -> dict[str, Object]:
    return {rule["alert"]: rule for group in alerts["groups"] for rule in group["rules"]}


@pytest.mark.parametrize("kind", ["none", "hpa", "keda"])
def test_one_switch_chooses_what_scales(kind: str) -> None:
    scaling = {"kind": kind, "keda": {"serverAddress": "http://prometheus:9090"}, "queueTokensPerReplica": 2_000_000}
    objects = render({"autoscaling": scaling, "serviceMonitor": {"enabled": True}})
    assert len(of_kind(objects, "HorizontalPodAutoscaler")) == (kind == "hpa")
    assert len(of_kind(objects, "ScaledObject")) == (kind == "keda")
    assert ("replicas" in the(objects, "Deployment")["spec"]) == (kind == "none")
    if kind == "hpa":
        (metric,) = the(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == "dense_reward_queue_tokens"
        assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "2000000"}
    if kind == "keda":
        (trigger,) = the(objects, "ScaledObject")["spec"]["triggers"]
        assert trigger["metadata"]["threshold"] == "2000000"
        wanted = 'sum(dense_reward_queue_tokens{namespace="rl",service="rewards-dense-reward"})'
        assert trigger["metadata"]["query"] == wanted


def test_an_external_metric_is_that_of_the_release() -> None:
    scaling = {"kind": "hpa", "hpa": {"metricType": "external"}}
    objects = render({"autoscaling": scaling, "serviceMonitor": {"enabled": True}})
    (metric,) = the(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["external"]["metric"]["selector"] == {"matchLabels": {"service": "rewards-dense-reward"}}


def test_a_query_of_ones_own_needs_no_service_monitor() -> None:
    keda = {"serverAddress": "http://prometheus:9090", "query": "sum(queue)"}
    (trigger,) = the(render({"autoscaling": {"kind": "keda", "keda": keda}}), "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["query"] == "sum(queue)"


def test_each_replica_is_scraped_once_as_the_alerts_and_the_dashboard_of_docker_expect() -> None:
    objects = render({"serviceMonitor": ON, "dashboard": ON, "nameOverride": "other"})
    monitor = the(objects, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    job, pending = endpoint["relabelings"]
    assert job == {"targetLabel": "job", "replacement": "dense-reward"}
    assert pending == {"sourceLabels": ["__meta_kubernetes_pod_phase"], "regex": "Pending", "action": "drop"}
    assert 'up{job="dense-reward"}' in json.dumps(ALERTS).replace("\\", "")
    wanted = monitor["selector"]["matchLabels"].items()
    services = of_kind(objects, "Service")
    assert [wanted <= service["metadata"]["labels"].items() for service in services] == [True, False]
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dense-reward.json").read_text("utf-8"))
    assert json.loads(the(objects, "ConfigMap/-dashboard")["data"]["dense-reward.json"]) == dashboard


@pytest.mark.parametrize("seconds", [1800, 5400])
def test_alerts_are_those_of_docker_for_one_release_and_the_time_that_a_start_may_take(seconds: int) -> None:
    made = rules(the(render({"prometheusRule": ON, "startupSeconds": seconds}), "PrometheusRule")["spec"])
    theirs = rules(ALERTS)
    assert list(made) == list(theirs)
    own = 'namespace="rl",service="rewards-dense-reward",'
    for alert in made.values():
        series = re.findall(r"\b(?:dense_reward_\w+|up)\b(.*?)[}]", alert["expr"])
        assert series
        assert all(labels.startswith("{" + own) for labels in series)
        alert["expr"] = alert["expr"].replace("{" + own + "}", "").replace(own, "")
    changed = {name for name in made if made[name] != theirs[name]}
    assert changed == {"DenseRewardNotReady"}
    alert = made["DenseRewardNotReady"]
    assert alert["for"] == f"{seconds}s"


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_examples_are_found_by_a_prometheus_of_kube_prometheus_stack(kind: str) -> None:
    """By default it selects only objects with the label of its release."""
    found = [made for name in EXAMPLES for made in of_kind(render(example(name)), kind)]
    assert found
    assert {made["metadata"]["labels"].get("release") for made in found} == {"kube-prometheus-stack"}
