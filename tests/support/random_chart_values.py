"""Values drawn at random from the chart's schema, the same for a seed, and corrected to contain no contradictions."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from rendered_chart import CHART, JOB, SCHEMA

Drawn = dict[str, Any]
# Examples for each pattern of the schema. A pattern without examples makes the draw fail.
NAMES = ("a", "7", "rewards", "team-a.keys")
TAGS = ("0.1.0", "0.1.0-vllm", "sha-0a1b2c3")
SIZES = ("512Mi", "4Gi", "1.5Gi")
CPUS = ("500m", "2", "0.5")
DIGESTS = (f"sha256:{'0a1b' * 16}",)
IMAGES = ("registry.example:5000/team/image:1.0", "registry.example/image@sha256:0a1b")
WORDS: Mapping[str, Sequence[str]] = {
    "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$": NAMES,
    "^$|^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$": ("", *NAMES),
    "^$|^[a-z]([a-z0-9-]*[a-z0-9])?$": ("", "rewards", "on"),
    "^[A-Za-z0-9._-]+$": ("key", "keys.json"),
    r"^[0-9]+(\.[0-9]+)?([kKMGTP]i?)?$": SIZES,
    r"^$|^[0-9]+(\.[0-9]+)?([kKMGTP]i?)?$": ("", *SIZES),
    r"^[0-9]+(\.[0-9]+)?m?$": CPUS,
    r"^$|^[0-9]+(\.[0-9]+)?m?$": ("", *CPUS),
    "^$|^[A-Za-z0-9_][A-Za-z0-9._-]*$": ("", *TAGS),
    "^$|^sha256:[0-9a-f]{64}$": ("", *DIGESTS),
    "^[a-z0-9][A-Za-z0-9._:/-]*$": ("dense-reward", "registry.example:5000/team/dense-reward"),
    "^$|^[a-z0-9][A-Za-z0-9._:/-]*$": ("", "registry.example/trainer"),
    "^$|^[a-z0-9][A-Za-z0-9._:/@-]*$": IMAGES,
    "^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$": ("sft", "runs/mine/checkpoints/reference"),
    "^$|^https?://[^ ]+$": ("http://prometheus:9090", "https://store.example"),
    "^[0-9]+(ms|s|m|h)$": ("15s", "1m"),
    "^$|^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?(@[A-Za-z0-9_./-]+)?$": ("Qwen/Qwen2.5-1.5B@main", "gpt2"),
    "^[a-z]([a-z0-9-]*[a-z0-9])?$": ("sft", "dpr-2", "a"),
    "^[A-Za-z0-9._/-]+$": ("sft_full", "recipes/mine.yaml"),
    "^[A-Za-z_][A-Za-z0-9_.]*=": ("seed=1", "data.source=my data.jsonl", 'note="quoted: {{ braces }}"'),
    r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$": ("nvidia.com/gpu", "amd.com/gpu"),
    "^(/[A-Za-z0-9._-]+)+$": ("/checkpoints", "/mnt/models"),
    "^[A-Za-z0-9._-]{1,64}$": ("half", "early.1"),
    "^$|^[a-z0-9]+://[A-Za-z0-9._/-]+$": ("s3://bucket/runs/mine",),
    "^[a-z0-9-]*$": ("", "eu-central-1"),
    "^[A-Za-z0-9._-]*$": ("", "mine"),
}
GPU_NODES = [{"key": "gpu", "operator": "In", "values": ["h100"]}]
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}
APART = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}
SIDECAR = {
    "image": "registry.example/other:1",
    "env": [{"name": "HOME", "value": "/tmp"}],
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    },
    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
}
# Examples of what the chart passes on without a schema of its own, by the last part of the key.
PASSED: Mapping[str, Sequence[Any]] = {
    "imagePullSecrets": (["a"], [{"name": "b"}]),
    "hosts": (["rewards.example"], [{"host": "*.rewards.example", "paths": [{"path": "/", "pathType": "Prefix"}]}]),
    "tls": ([], [{"secretName": "a", "hosts": ["rewards.example"]}]),
    "parentRefs": ([{"name": "gateway", "namespace": "infra"}],),
    "env": (
        [{"name": "HTTPS_PROXY", "value": "http://p"}],
        [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}],
    ),
    "envFrom": ([], [{"secretRef": {"name": "a"}}]),
    "tolerations": ([{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],),
    "nodeSelectorTerms": ([], [{"matchExpressions": GPU_NODES}]),
    "affinity": (
        {},
        {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [APART]}},
        {"nodeAffinity": {}},
    ),
    "topologySpreadConstraints": ([SPREAD], [{**SPREAD, "labelSelector": {"matchLabels": {"a": "b"}}}]),
    "podSecurityContext": ({}, {"supplementalGroups": [1], "fsGroup": 7}),
    "extraPodSpec": ({}, {"dnsPolicy": "Default", "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}]}),
    "extraVolumes": ([{"name": "more", "emptyDir": {}}],),
    "extraVolumeMounts": ([], [{"name": "more", "mountPath": "/more", "readOnly": True}]),
    "extraInitContainers": ([], [{"name": "before", **SIDECAR}]),
    "extraContainers": ([], [{"name": "beside", **SIDECAR}]),
    "extraObjects": ([], [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "more"}}]),
    "from": ([], [{"podSelector": {}}]),
    "egress": ([{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 443, "protocol": "TCP"}]}],),
    "maxUnavailable": (1, "50%", None),
    "minAvailable": (None, 1, "50%"),
}
FREE_WORDS = ("word", "two words", "yes", "1.0", "{{ braces }}", 'a "quoted" one')


def random_values(seed: int) -> Drawn:
    """Values that the chart must accept."""
    draw = random.Random(seed)
    values = _object(SCHEMA, draw)
    values.pop("global", None)
    return completed(values)


def _drawn(schema: Drawn, draw: random.Random) -> Any:  # noqa: ANN401 - any value that JSON has
    if "$ref" in schema:
        return _drawn(SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]], draw)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return KINDS[draw.choice(kinds)](schema, draw)


def _object(schema: Drawn, draw: random.Random) -> Drawn:
    properties, needed = schema.get("properties"), set(schema.get("required", ()))
    if properties is None:
        return {f"example.com/{name}": draw.choice(FREE_WORDS) for name in "ab"[: draw.randint(0, 2)]}
    chosen = [name for name in properties if name in needed or draw.random() < 0.7]
    passed = {name for name in PASSED if "properties" not in properties.get(name, {})}
    return {name: draw.choice(PASSED[name]) if name in passed else _drawn(properties[name], draw) for name in chosen}


def _array(schema: Drawn, draw: random.Random) -> list[Any]:
    return [_drawn(schema["items"], draw) for _ in range(draw.randint(schema.get("minItems", 0), 2))]


def _integer(schema: Drawn, draw: random.Random) -> int:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    return draw.randint(least, min(schema.get("maximum", 10_000_000), least + draw.choice((1, 100, 5_000_000))))


def _number(schema: Drawn, draw: random.Random) -> float:
    return draw.choice((0.25, 0.5, 1)) if schema.get("maximum") == 1 else draw.choice((0.5, 2, 3.5))


def _string(schema: Drawn, draw: random.Random) -> str:
    return draw.choice(WORDS[schema["pattern"]] if "pattern" in schema else FREE_WORDS)


KINDS: Mapping[str, Callable[[Drawn, random.Random], Any]] = {
    "object": _object,
    "array": _array,
    "integer": _integer,
    "number": _number,
    "string": _string,
    "boolean": lambda _, draw: draw.random() < 0.5,
    "null": lambda _, __: None,
}


def completed(values: Drawn) -> Drawn:
    """The values, plus everything that their switches need, by the rules of definitions/_refusals.tpl of the chart."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    made: Drawn = merged(defaults, values)
    _complete_trainer(made)
    _complete_checkpoints(made["checkpoints"], made["settings"])
    _complete_engine(made)
    monitor, scaling = made["serviceMonitor"], made["autoscaling"]
    if made["settings"].get("isolate_keys"):
        made["apiKeys"]["secretName"] = "keys"
    monitor["secretName"] = monitor["secretName"] or "metrics"
    scaling["keda"]["serverAddress"] = scaling["keda"]["serverAddress"] or "http://prometheus:9090"
    if scaling["kind"] != "none":
        monitor["enabled"] = True
    scaling["maxReplicaCount"] = max(scaling["minReplicaCount"], scaling["maxReplicaCount"])
    if made["caBundle"]["configMapName"]:
        made["caBundle"]["secretName"] = ""
    if made["podDisruptionBudget"]["maxUnavailable"] is None:
        made["podDisruptionBudget"]["minAvailable"] = 1
    made["extraVolumeMounts"] = made["extraVolumeMounts"] if made["extraVolumes"] else []
    route = made["httpRoute"]
    route["parentRefs"] = route["parentRefs"] or [{"name": "gateway"}]
    proxy, most = made["proxy"], scaling["maxReplicaCount"] if scaling["kind"] != "none" else made["replicaCount"]
    proxy.update(maxReplicas=max(proxy["maxReplicas"], most + made["maxSurge"]), image=proxy["image"] or IMAGES[0])
    if made["tls"]["secretName"]:
        proxy["enabled"] = False
    if "nodeAffinity" in made["affinity"]:
        made["nodeSelectorTerms"] = []
    return made


def _complete_trainer(made: Drawn) -> None:
    trainer = made["trainer"]
    if trainer["kind"] != "none":
        trainer["jobs"] = trainer["jobs"] or [dict(JOB)]
        made["checkpoints"]["source"] = "pvc"
    for at, job in enumerate(trainer["jobs"]):
        job["name"] = f"{job['name']}-{at}"
        job["requestGPU"] = min(job.get("requestGPU", 0), 8 if job["job"] == "sft" else 1)
    if not trainer["image"]["repository"]:
        trainer["image"].update(tag="", digest="")
    trainer["apiKey"]["secretName"] = trainer["apiKey"]["secretName"] or "key"


def _complete_checkpoints(checkpoints: Drawn, settings: Drawn) -> None:
    checkpoints["s3"]["uri"] = checkpoints["s3"]["uri"] or "s3://bucket/run"
    checkpoints["image"]["reference"] = checkpoints["image"]["reference"] or "registry.example/run:1"
    hub = checkpoints["hub"]
    hub.update(sft=hub["sft"] or "me/sft", reference=hub["reference"] or "me/half", runId=hub["runId"] or "mine")
    if checkpoints["source"] == "none":
        settings["engine"] = "fake"
    if checkpoints["source"] == "hub" or settings["engine"] == "remote":
        checkpoints["pairs"] = []


def _complete_engine(made: Drawn) -> None:
    settings = made["settings"]
    if settings["engine"] == "remote":
        settings.update(sft_url="http://a:8000", reference_url="http://b:8000")
    if settings["engine"] in {"remote", "fake"}:
        made["requestGPU"] = 0
    if settings["engine"] in {"remote", "vllm"}:
        for name in ("deterministic", "head_dtype", "norm_dtype"):
            settings.pop(name, None)
    if settings["engine"] == "torch":
        made["requestGPU"] = min(made["requestGPU"], 2)
    if settings["engine"] == "vllm":
        settings["tensor_parallel"] = min(settings.get("tensor_parallel") or 1, 8)
        made["requestGPU"] = settings["tensor_parallel"] * 2
    for name in ("device", "reference_device"):  # the words that are drawn are no devices
        settings.pop(name, None)


def merged(defaults: Drawn, values: Drawn) -> Drawn:
    """Merges mappings key by key and replaces every other value, as Helm does."""
    result = copy.deepcopy(defaults)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
