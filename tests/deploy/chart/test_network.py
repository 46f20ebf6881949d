"""Which peers reach the service, which it reaches, and the names of its addresses."""

from typing import Any

import pytest
from rendered_chart import EXAMPLES, Object, example, of_kind, render, service_container, the


def ports_out(policy: Object) -> list[int]:
    return [port["port"] for rule in policy["egress"] for port in rule["ports"]]


def test_a_network_policy_lets_in_the_release_and_who_is_named() -> None:
    policy = {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"name": "rl"}}}]}
    named = the(render({"networkPolicy": policy}), "NetworkPolicy")["spec"]
    assert len(named["ingress"][0]["from"]) == 2
    assert ports_out(named) == [53, 53, 5353, 5353]


@pytest.mark.parametrize(
    ("source", "port"),
    [
        ({"source": "s3", "s3": {"uri": "s3://b/r"}}, 443),
        ({"source": "s3", "s3": {"uri": "s3://b/r", "endpointUrl": "https://store.example"}}, 443),
        ({"source": "s3", "s3": {"uri": "s3://b/r", "endpointUrl": "http://minio:9000/"}}, 9000),
        ({"source": "s3", "s3": {"uri": "s3://b/r", "endpointUrl": "http://store.example"}}, 80),
        ({"source": "s3", "s3": {"uri": "s3://b/r", "endpointUrl": "https://[fd00::1]"}}, 443),
        ({"source": "hub", "hub": {"sft": "me/sft", "reference": "me/half", "runId": "mine"}}, 443),
    ],
)
def test_a_network_policy_lets_the_download_out(source: dict[str, Any], port: int) -> None:
    policy = the(render({"networkPolicy": {"enabled": True}, "checkpoints": source}), "NetworkPolicy")["spec"]
    assert ports_out(policy) == [53, 53, 5353, 5353, port]


def test_examples_with_a_network_policy_let_pods_of_the_namespace_ask() -> None:
    policies = [policy for name in EXAMPLES for policy in of_kind(render(example(name)), "NetworkPolicy")]
    assert policies
    for policy in policies:
        assert {"podSelector": {}} in policy["spec"]["ingress"][0]["from"]


def test_a_second_service_names_the_address_of_each_replica() -> None:
    """haproxy connects to the pods directly, so the headless service needs the pods' port."""
    objects = render({"service": {"port": 80, "type": "LoadBalancer", "annotations": {"a": "b"}}})
    service, replicas = of_kind(objects, "Service")
    assert replicas["metadata"]["name"] == "rewards-dense-reward-replicas"
    (port,) = replicas["spec"].pop("ports")
    assert port["port"] == service_container(objects)["ports"][0]["containerPort"]
    assert replicas["spec"] == {"clusterIP": "None", "selector": service["spec"]["selector"]}
