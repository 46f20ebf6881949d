"""Invalid and contradictory values are refused before anything is rendered, with a message that names the key."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rendered_chart import CHART, JOB, SCHEMA, fake, helm, render

from bench.hostile.deployment import of_chart, of_compose

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "replica"),
    ({"image": {"tagg": "1"}}, "tagg"),
    ({"settings": {"max_batch_token": 5}}, "max_batch_token"),
    ({"settings": {"sft": "/somewhere"}}, "sft"),
    ({"settings": {"api_keys_file": "/somewhere"}}, "api_keys_file"),
    ({"settings": {"engine": "steam"}}, "engine"),
    ({"settings": {"threads": 0}}, "threads"),
    ({"settings": {"drain_s": None}}, "drain_s"),
    ({"settings": {"deterministic": "yes"}}, "deterministic"),
    ({"requestGPU": "1"}, "requestGPU"),
    ({"requestGPU": 1.5}, "requestGPU"),
    ({"requestMemory": "16 GB"}, "requestMemory"),
    ({"checkpoints": {"source": "nfs"}}, "source"),
    ({"checkpoints": {"mountPath": "checkpoints"}}, "mountPath"),
    ({"apiKeys": {"key": "a-key-in-plain-sight"}}, "key"),
    ({"apiKeys": "a-key-in-plain-sight"}, "apiKeys"),
    ({"autoscaling": {"kind": "vpa"}}, "kind"),
    ({"autoscaling": {"minReplicaCount": 0}}, "minReplicaCount"),
    ({"tolerations": {"key": "a"}}, "tolerations"),
    ({"affinity": []}, "affinity"),
    ({"extraVolumes": ["scratch"]}, "extraVolumes"),
    ({"env": [{"value": "1"}]}, "env"),
    ({"httpRoute": {"gateway": "a"}}, "gateway"),
    ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
    ({"securityContext": {"privileged": True}}, "privileged"),
    ({"maxSurge": 0}, "maxSurge"),
    ({"ingress": {"hosts": []}}, "hosts"),
    ({"trainer": {"jobs": [{"name": "a", "job": "sft"}]}}, "recipe"),
    ({"trainer": {"jobs": [{"name": "a" * 17}]}}, "name"),
    ({"trainer": {"jobs": [{**JOB, "requestGPU": 65}]}}, "requestGPU"),
    ({"image": {"digest": "sha256:0a1b"}}, "digest"),
    ({"service": {"port": 70000}}, "port"),
]
PASSWORD = "a-key-in-plain-sight"
HUB = {"source": "hub", "hub": {"sft": "me/sft", "reference": "me/half"}}
# Contradictions between values, with the chart's own messages.
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 2}, "replicas is no value of this chart: use replicaCount"),
    ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources is no value .*: use .* requestGPU"),
    ({"volumes": []}, "volumes is no value of this chart: use extraVolumes"),
    ({"initContainers": []}, "use extraInitContainers"),
    ({"args": ["--dtype", "bfloat16"]}, "args is no value of this chart: use settings"),
    ({"servingEngineSpec": {"modelSpec": []}}, "servingEngineSpec is no value .* README.md lists"),
    ({"autoscaling": {"enabled": True}}, "autoscaling.enabled is no value of this chart: use autoscaling.kind"),
    ({"settings": {"otlp_endpoint": f"http://user:{PASSWORD}@c:4318"}}, "settings.otlp_endpoint has credentials"),
    ({"env": [{"name": "HTTPS_PROXY", "value": f"http://user:{PASSWORD}@proxy"}]}, "env: HTTPS_PROXY has credentials"),
    (
        {
            "checkpoints": {
                "source": "s3",
                "s3": {"uri": "s3://models/run", "endpointUrl": f"http://a:{PASSWORD}@minio"},
            }
        },
        "checkpoints.s3.endpointUrl has credentials .*: name a secret",
    ),
    (
        {"trainer": {"jobs": [{**JOB, "changes": [f"service_url=http://x:{PASSWORD}@rewards:8000"]}]}},
        "trainer.jobs: sft: changes has credentials",
    ),
    ({"image": {"tag": "latest"}}, "image.tag: latest is not a version"),
    ({"trainer": {"image": {"tag": "latest"}}}, "trainer.image.tag: latest"),
    ({"checkpoints": {"s3": {"image": "registry.example:5000/aws-cli"}}}, "checkpoints.s3.image: .* has no tag"),
    (
        {"checkpoints": {"s3": {"image": "aws-cli:latest"}}},
        "checkpoints.s3.image: aws-cli:latest has .* latest: name a version",
    ),
    ({"test": {"image": "registry.example/dense-reward"}}, "test.image: .* has no tag"),
    (
        {"trainer": {"image": {"repository": "", "tag": "1"}}},
        "trainer.image.repository is empty, but trainer.image.tag",
    ),
    ({"checkpoints": {"source": "none"}}, "checkpoints.source: none is only for settings.engine fake"),
    ({"checkpoints": {"source": "s3"}}, "checkpoints.s3.uri is empty"),
    ({"checkpoints": {"source": "image"}}, "checkpoints.image.reference is empty"),
    ({"checkpoints": {"source": "hub"}}, "checkpoints.hub.sft and checkpoints.hub.reference"),
    ({"checkpoints": HUB}, "checkpoints.hub.runId"),
    (
        {
            "checkpoints": {**HUB, "pairs": [{"name": "a", "sft": "a", "reference": "b"}]},
            "settings": {"allow_unrelated": True},
        },
        "checkpoints.pairs",
    ),
    ({"settings": {"engine": "vllm", "tensor_parallel": 2}}, "requestGPU: .* needs at least 2 GPUs"),
    ({"settings": {"engine": "vllm"}, "requestGPU": 0}, "requestGPU: .* needs at least 1 GPUs"),
    ({"settings": {"engine": "remote", "sft_url": "http://a:1"}}, "settings.sft_url and settings.reference_url"),
    ({"settings": {"engine": "vllm", "deterministic": True}}, "settings.deterministic: .* only torch does"),
    ({"settings": {"engine": "vllm", "head_dtype": "float32"}}, "settings.head_dtype: .* only torch does"),
    ({**fake(), "requestGPU": 1}, "requestGPU: settings.engine fake does not use a GPU"),
    (
        {"settings": {"engine": "remote", "sft_url": "http://a:1", "reference_url": "http://b:1"}},
        "requestGPU: settings.engine remote does not use a GPU: set requestGPU to 0",
    ),
    ({"settings": {"isolate_keys": True}}, "settings.isolate_keys"),
    ({"apiKeys": {"secretName": "keys"}, "serviceMonitor": {"enabled": True}}, "serviceMonitor.secretName"),
    ({"autoscaling": {"kind": "keda"}}, "autoscaling.keda.serverAddress"),
    (
        {"autoscaling": {"kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}},
        "autoscaling.kind keda .* enable serviceMonitor, or set your own query in autoscaling.keda.query",
    ),
    ({"autoscaling": {"kind": "hpa"}}, "autoscaling.kind hpa .* enable serviceMonitor"),
    (
        {"autoscaling": {"minReplicaCount": 5}},
        "autoscaling.minReplicaCount is above autoscaling.maxReplicaCount: 5 > 4",
    ),
    ({"trainer": {"kind": "Job"}}, "trainer.jobs is empty"),
    ({"trainer": {"kind": "JobSet", "jobs": [JOB, JOB]}}, "trainer.jobs: two jobs have the same name: sft, sft"),
    (
        {**fake(), "trainer": {"kind": "Job", "jobs": [JOB]}},
        "trainer.kind: the trainer writes to a claim, but checkpoints.source is none",
    ),
    (
        {
            "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}],
            "affinity": {"nodeAffinity": {}},
        },
        "nodeSelectorTerms and affinity.nodeAffinity",
    ),
    ({"commonLabels": {"app.kubernetes.io/name": "a"}}, "commonLabels: app.kubernetes.io/name is set by the chart"),
    ({"podLabels": {"app.kubernetes.io/component": "a"}}, "podLabels: app.kubernetes.io/component"),
    (
        {"requestGPU": 3},
        "requestGPU: settings.engine torch uses one GPU, or one for each model, not 3: set replicaCount",
    ),
    ({"settings": {"device": "cpu"}}, "settings.device: cpu leaves the GPUs of requestGPU unused: remove it"),
    ({"requestGPU": 0, "settings": {"device": "cuda:0"}}, "settings.device: cuda needs a GPU: set requestGPU"),
    (
        {"requestGPU": 8, "settings": {"engine": "vllm", "tensor_parallel": 2}},
        "requestGPU: with tensor_parallel 2 .* requestGPU is 8: set it to 2 or 4",
    ),
    (
        {"checkpoints": {"source": "s3", "s3": {"uri": "gs://bucket/x"}}},
        "checkpoints.s3.uri: gs://bucket/x .* in extraInitContainers",
    ),
    ({"podSecurityContext": {"runAsUser": 0}}, "podSecurityContext.runAsUser: no container runs as root"),
    ({"extraPodSpec": {"hostNetwork": True}}, "extraPodSpec.hostNetwork is fixed by the chart: remove it"),
    ({"extraPodSpec": {"nodeSelector": {}}}, "extraPodSpec.nodeSelector .* use the chart's own value"),
    ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "extraVolumes: .* called tmp: choose another name"),
    ({"caBundle": {"configMapName": "a", "secretName": "b"}}, "caBundle.configMapName and caBundle.secretName"),
    ({"imagePullSecrets": [{"nam": "a"}]}, "imagePullSecrets: an entry has no name: write"),
    ({"ingress": {"hosts": [{"hostname": "a"}]}}, "ingress.hosts: an entry is a host name, or"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
    (
        {"apiKeys": {"secretName": "keys"}, "trainer": {"kind": "Job", "jobs": [{**JOB, "job": "dpr"}]}},
        "trainer.apiKey.secretName is empty, but with apiKeys the job sft needs a key too",
    ),
    (
        {"trainer": {"kind": "Job", "jobs": [{**JOB, "job": "rft", "requestGPU": 2}]}},
        "trainer.jobs: rft runs in one process: set requestGPU of sft to 1",
    ),
    (
        {"env": [{"name": "dense_reward_port", "value": "1"}]},
        "env: dense_reward_port is a setting: put it into settings",
    ),
    ({"env": [{"name": "HF_HOME", "value": "/tmp"}]}, "env: HF_HOME is set by the chart"),
]


@pytest.mark.parametrize(("values", "key"), WRONG, ids=json.dumps)
def test_a_value_that_the_schema_does_not_take_is_refused_by_its_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(helm.HelmError, match=rf"\b{key}\b"):
        render(values)


@pytest.mark.parametrize(("values", "message"), TOGETHER, ids=json.dumps)
def test_values_that_do_not_go_together_are_refused_with_the_cure(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(values)


def test_no_key_is_in_what_the_chart_and_the_compose_file_render_or_refuse() -> None:
    places = [*of_chart(PASSWORD), *of_compose(PASSWORD)]
    assert [name for name, text in places if PASSWORD in text] == []
    assert "refused: " not in places[0][1], "a key in a secret is the cure of the others"
    assert all("refused: " in text for name, text in places[1:] if name.startswith("chart: "))


def mappings(schema: Any, path: str = "values") -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401 - JSON
    """Every place of the schema that describes a mapping, with its path."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and path != "values/properties/global":
            yield path, schema
        for key, inner in schema.items():
            yield from mappings(inner, f"{path}/{key}")
    elif isinstance(schema, list):
        for at, inner in enumerate(schema):
            yield from mappings(inner, f"{path}/{at}")


@pytest.mark.parametrize(("path", "schema"), list(mappings(SCHEMA)), ids=str)
def test_no_mapping_of_the_chart_takes_unknown_keys(path: str, schema: dict[str, Any]) -> None:
    """Labels and annotations are maps of strings with any key; what Kubernetes defines is passed on to it."""
    free = schema.get("additionalProperties", True)
    passed = ("properties/service", "env/items", "definitions/passedThrough")
    assert (
        free is False or (free == {"type": "string"} and path.endswith("definitions/strings")) or path.endswith(passed)
    )


def test_the_schema_is_no_second_kubernetes() -> None:
    text = (CHART / "values.schema.json").read_text("utf-8")
    assert len(text.splitlines()) <= 600
    assert not {"matchExpressions", "topologyKey", "secretKeyRef", "effect", "cidr"} & set(re.findall(r"\w+", text))
