"""One switch puts the proxy in front of the replicas: with the configuration that is tested, at the same name."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rendered_chart import ROOT, Object, environment, helm, of_kind, render

NAME = "rewards-dense-reward"


def with_proxy(**values: Any) -> list[Object]:  # noqa: ANN401 - values of the chart
    return render({**values, "proxy": {"enabled": True, **values.get("proxy", {})}})


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [made for made in of_kind(objects, kind) if made["metadata"]["name"] == name]
    return found


def haproxy_of(objects: list[Object]) -> Object:
    (container,) = named(objects, "Deployment", f"{NAME}-proxy")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_it_is_off_unless_it_is_switched_on() -> None:
    objects = render({})
    assert not [made for made in objects if made["metadata"]["name"].endswith("-proxy")]
    assert named(objects, "Service", NAME)["spec"]["selector"]["app.kubernetes.io/component"] == "service"


def test_it_answers_at_the_name_of_the_service_and_finds_the_replicas_by_another() -> None:
    objects = with_proxy()
    proxies = named(objects, "Deployment", f"{NAME}-proxy")["spec"]["template"]["metadata"]["labels"]
    replicas = named(objects, "Deployment", NAME)["spec"]["template"]["metadata"]["labels"]
    front, behind = named(objects, "Service", NAME), named(objects, "Service", f"{NAME}-replicas")
    assert front["spec"]["selector"].items() <= proxies.items()
    assert behind["spec"]["selector"].items() <= replicas.items()
    assert not front["spec"]["selector"].items() <= replicas.items()
    assert behind["spec"]["clusterIP"] == "None"
    assert environment(haproxy_of(objects))["REPLICAS"] == f"{NAME}-replicas.rl.svc.cluster.local:8000"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_replicas_are_scraped_once_and_their_series_have_one_name(enabled: bool) -> None:
    objects = render({"proxy": {"enabled": enabled}, "serviceMonitor": {"enabled": True}})
    (monitor,) = of_kind(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    scraped = [
        made["metadata"]["name"] for made in of_kind(objects, "Service") if wanted <= made["metadata"]["labels"].items()
    ]
    assert scraped == [f"{NAME}-replicas" if enabled else NAME]
    renamed = {"targetLabel": "service", "replacement": NAME}
    assert (renamed in monitor["spec"]["endpoints"][0]["relabelings"]) == enabled


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_haproxy_takes_its_configuration_which_is_the_tested_one(tmp_path: Path, replicas: int) -> None:
    objects = with_proxy(proxy={"maxReplicas": replicas + 1}, replicaCount=replicas)
    text = named(objects, "ConfigMap", f"{NAME}-proxy")["data"]["haproxy.cfg"]
    assert text.strip() == (ROOT / "docker" / "haproxy" / "haproxy.cfg").read_text("utf-8").strip()
    (tmp_path / "haproxy.cfg").write_text(text)
    variables = os.environ | environment(haproxy_of(objects))
    subprocess.run(["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], check=True, env=variables)


@pytest.mark.parametrize(
    ("settings", "server_s"), [({}, 610), ({"max_request_s": 30}, 40), ({"max_request_s": 0.5}, 11)]
)
def test_it_waits_longer_than_a_replica_may_take_and_is_given_that_time_to_stop(
    settings: dict[str, float], server_s: int
) -> None:
    objects = with_proxy(settings=settings, preStopSeconds=7)
    assert environment(haproxy_of(objects))["SERVER_S"] == str(server_s)
    pod = named(objects, "Deployment", f"{NAME}-proxy")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 7 + server_s + 10


def test_it_reaches_the_replicas_alone_where_traffic_is_limited() -> None:
    objects = with_proxy(networkPolicy={"enabled": True})
    rules = named(objects, "NetworkPolicy", f"{NAME}-proxy")["spec"]["egress"]
    (to,) = [peer for rule in rules for peer in rule.get("to", [])]
    replicas = named(objects, "Deployment", NAME)["spec"]["template"]["metadata"]["labels"]
    assert to["podSelector"]["matchLabels"].items() <= replicas.items()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tls": {"secretName": "mine"}}, "remove tls.secretName and end TLS at the ingress"),
        ({"replicaCount": 16}, "proxy.maxReplicas: 16 is fewer than the 17 replicas"),
        ({"proxy": {"image": "haproxy:latest"}}, "proxy.image: haproxy:latest has no tag or the tag latest"),
        ({"proxy": {"image": "haproxy"}}, "proxy.image: haproxy has no tag"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_cure(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=reason):
        with_proxy(**values)
