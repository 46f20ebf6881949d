"""The chart as Helm's own code renders it, without a cluster: values in, Kubernetes objects out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk: make test-deploy")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dense-reward"
EXAMPLES = sorted(path.name for path in (CHART / "examples").glob("*.yaml"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
# The oldest version that Chart.yaml allows, a later one, and the newest one that kubernetes-validate has schemas for.
KUBERNETES = ("1.30", "1.34", "1.37")
Values = Mapping[str, Any]  # parsed from YAML
Object = dict[str, Any]  # a Kubernetes object, parsed from YAML
JOB = {"name": "sft", "job": "sft", "recipe": "sft_full", "requestCPU": "1", "requestMemory": "1Gi"}


def example(name: str) -> Values:
    values: Values = yaml.safe_load((CHART / "examples" / name).read_text("utf-8"))
    return values


def fake(**values: object) -> dict[str, object]:
    """Values of the smallest release, without a model or a GPU, plus the given ones."""
    return {"settings": {"engine": "fake", "drain_s": 60}, "checkpoints": {"source": "none"}, "requestGPU": 0, **values}


def render(values: Values, release: str = "rewards", chart: str | Path = CHART) -> list[Object]:
    """Every object of the release, tests included. Raises HelmValuesError or HelmRenderError."""
    with helm.Chart.load(chart) as loaded:
        texts = loaded.render(dict(values), name=release, namespace="rl")
    manifests = [text for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    return [made for text in manifests for made in yaml.safe_load_all(text) if made]


def notes(values: Values) -> str:
    with helm.Chart.load(CHART) as chart:
        texts: Mapping[str, str] = chart.render(dict(values), name="rewards", namespace="rl")
    return texts["dense-reward/templates/NOTES.txt"]


def lint(values: Values) -> list[str]:
    """The warnings and errors of `helm lint --strict` for the chart with these values."""
    report: Mapping[str, list[Any]] = helm.lint(CHART, dict(values), strict=True)
    return [f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] > 1] + report["errors"]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [made for made in objects if made["kind"] == kind]


def the(objects: list[Object], kind: str) -> Object:
    """The only object of a kind; `ConfigMap/-pairs` also gives the ending of its name."""
    kind, _, ending = kind.partition("/")
    (found,) = [made for made in of_kind(objects, kind) if not ending or made["metadata"]["name"].endswith(ending)]
    return found


def settings_of(objects: list[Object], release: str = "rewards-dense-reward") -> dict[str, str]:
    """The service's environment, from its ConfigMap."""
    data: dict[str, str] = next(m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == release)["data"]
    return data


def environment(container: Object) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def jobs(objects: list[Object]) -> Iterator[Object]:
    """Specs of all jobs, including those inside a JobSet."""
    yield from (made["spec"] for made in of_kind(objects, "Job"))
    for made in of_kind(objects, "JobSet"):
        yield from (replicated["template"]["spec"] for replicated in made["spec"]["replicatedJobs"])


def pods(objects: list[Object]) -> Iterator[Object]:
    """Specs of all pods that the release starts."""
    yield from (made["spec"]["template"]["spec"] for made in of_kind(objects, "Deployment"))
    yield from (made["spec"] for made in of_kind(objects, "Pod"))
    yield from (job["template"]["spec"] for job in jobs(objects))


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def service_pod(objects: list[Object]) -> Object:
    """The pod of the replicas; the other Deployment, if there is one, is the proxy's."""
    made = of_kind(objects, "Deployment")
    (replicas,) = [one for one in made if not one["metadata"]["name"].endswith("-proxy")]
    spec: Object = replicas["spec"]["template"]["spec"]
    return spec


def service_container(objects: list[Object]) -> Object:
    container: Object = service_pod(objects)["containers"][0]
    return container
