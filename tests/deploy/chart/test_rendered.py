"""Whatever the values, Kubernetes and the operators of its custom objects accept the chart's objects."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from checked_objects import CRDS, check, check_all, jsonschema, kubernetes
from random_chart_values import random_values
from rendered_chart import (
    CHART,
    EXAMPLES,
    KUBERNETES,
    Object,
    example,
    helm,
    lint,
    of_kind,
    render,
    service_container,
    service_pod,
    the,
)

SEEDS = range(30)
IMAGE = {"checkpoints": {"source": "image", "image": {"reference": "registry.example/run:1"}}}


def has_image_volume(objects: list[Object]) -> bool:
    volumes = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["volumes"]
    return any("image" in volume for volume in volumes)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_example_is_taken_by_kubernetes(name: str, version: str) -> None:
    assert lint(example(name)) == []
    check_all(render(example(name)), version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_defaults_are_taken_by_kubernetes(version: str) -> None:
    assert lint({}) == []
    check_all(render({}), version)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_the_schema_takes_is_rendered_and_linted(seed: int) -> None:
    values = random_values(seed)
    assert lint(values) == []
    objects = render(values)
    for version in KUBERNETES:
        if version != KUBERNETES[0] or not has_image_volume(objects):
            check_all(objects, version)


def test_the_draw_reaches_every_kind_of_object_and_every_choice() -> None:
    """Otherwise the test above covers less than its name states."""
    drawn = [random_values(seed) for seed in SEEDS]
    kinds = {made["kind"] for values in drawn for made in render(values)}
    assert kinds == {
        "ConfigMap",
        "Deployment",
        "HTTPRoute",
        "HorizontalPodAutoscaler",
        "Ingress",
        "Job",
        "JobSet",
        "Namespace",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Pod",
        "PodDisruptionBudget",
        "PrometheusRule",
        "ScaledObject",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    }
    assert {values["checkpoints"]["source"] for values in drawn} == {"pvc", "s3", "hub", "image", "none"}
    assert {values["settings"]["engine"] for values in drawn} == {"torch", "vllm", "remote", "fake"}


def test_an_image_as_a_volume_is_what_kubernetes_1_30_does_not_know() -> None:
    (deployment,) = of_kind(render(IMAGE), "Deployment")
    check(deployment, "1.34")
    with pytest.raises(kubernetes.ValidationError, match="image"):
        check(deployment, "1.30")


def test_an_image_as_a_volume_is_refused_where_kubernetes_does_not_know_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Only `helm lint` accepts a version without a cluster. It logs a refusal of the chart and continues."""
    refusal = "checkpoints.source: image needs Kubernetes 1.31"
    helm.lint(CHART, IMAGE, kube_version="v1.31.0")
    assert refusal not in capfd.readouterr().err
    helm.lint(CHART, IMAGE, kube_version="v1.30.0")
    assert refusal in capfd.readouterr().err


def test_what_is_packaged_renders_as_the_folder_does(tmp_path: Path) -> None:
    archive = helm.package(CHART, destination=tmp_path)
    assert render(example("one-gpu.yaml"), chart=archive) == render(example("one-gpu.yaml"))


def test_the_first_releases_of_the_readme_are_taken() -> None:
    """The first needs no model and no GPU: its image is the small one."""
    text = (CHART / "README.md").read_text("utf-8")
    commands = re.findall(r"^helm install .*?(?=\n(?:helm|```))", text, re.MULTILINE | re.DOTALL)
    images = []
    for command in commands:
        values = helm.parse_set_string(",".join(re.findall(r"--set (\S+)", command)))
        assert lint(values) == []
        objects = render(values)
        check_all(objects, KUBERNETES[0])
        images.append(service_container(objects)["image"].rpartition("-")[2])
    assert images == ["cpu", "cuda"]


def test_the_chart_can_be_part_of_another_and_switched_off_by_it(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(CHART, parent / "charts" / "dense-reward")
    dependency = {"name": "dense-reward", "version": ">=0", "condition": "dense-reward.enabled"}
    description = {"apiVersion": "v2", "name": "parent", "version": "0.1.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(description), "utf-8")
    shared = {
        "global": {"storageClass": "fast", "imageRegistry": "r.example", "imagePullSecrets": ["a", {"name": "b"}]}
    }
    objects = render({**shared, "dense-reward": {"enabled": True}}, chart=parent)
    assert the(objects, "PersistentVolumeClaim")["spec"]["storageClassName"] == "fast"
    assert service_container(objects)["image"].startswith("r.example/dense-reward:")
    assert service_pod(objects)["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert render({"dense-reward": {"enabled": False}}, chart=parent) == []


@pytest.mark.parametrize("kind", sorted(path.stem for path in CRDS.glob("*.json")))
def test_the_schema_of_a_custom_object_refuses_unknown_fields_and_wrong_types(kind: str) -> None:
    values = {
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        "autoscaling": {"kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}},
        **{key: example("cpu.yaml")[key] for key in ("trainer", "checkpoints")},
    }
    (made,) = of_kind(render(values), kind)
    check(made, KUBERNETES[0])
    for spec in ({**made["spec"], "unknown": 1}, {}):
        with pytest.raises(jsonschema.ValidationError):
            check({**made, "spec": spec}, KUBERNETES[0])


@pytest.mark.parametrize("release", ["dense-reward", "a" * 53, "rewards"])
def test_names_fit_whatever_the_release_is_called(release: str) -> None:
    values = {**example("cpu.yaml"), "dashboard": {"enabled": True}}
    check_all(render(values, release), KUBERNETES[-1])
