"""What each switch of the chart does to the objects that it renders."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import (
    CHART,
    ROOT,
    Object,
    Values,
    example,
    fake,
    jobs,
    notes,
    of_kind,
    render,
    service_container,
    service_pod,
    settings_of,
    the,
)
from dense_reward.pairs import SOURCES
from dense_reward_trainer.cli import JOBS
from dense_reward_trainer.config import config_path, load_config

JOB = {"name": "sft", "job": "sft", "recipe": "sft_full", "requestCPU": "1", "requestMemory": "1Gi"}


def environment(container: Object) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def test_a_number_reaches_the_service_as_it_was_written() -> None:
    settings = {"max_queue_tokens": 1_048_576, "max_request_s": 0.5, "gpu_memory_utilization": 1, "deterministic": True}
    data = settings_of(render({"settings": settings}))
    assert data["DENSE_REWARD_MAX_QUEUE_TOKENS"] == "1048576"
    assert data["DENSE_REWARD_MAX_REQUEST_S"] == "0.5"
    assert data["DENSE_REWARD_GPU_MEMORY_UTILIZATION"] == "1"
    assert data["DENSE_REWARD_DETERMINISTIC"] == "true"


def test_a_setting_that_is_null_is_left_to_the_service() -> None:
    assert "DENSE_REWARD_THREADS" not in settings_of(render({"settings": {"threads": None}}))
    assert "DENSE_REWARD_LOG_FORMAT" not in settings_of(render({"settings": {"log_format": None}}))


def test_changed_settings_roll_the_replicas_and_unchanged_ones_do_not() -> None:
    def sums(**settings: int) -> Any:  # noqa: ANN401 - a label
        deployment = the(render({"settings": settings}), "Deployment")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]

    assert sums(max_items=5) == sums(max_items=5) != sums(max_items=6)


def test_changed_pairs_roll_the_replicas() -> None:
    def template(sft: str) -> Any:  # noqa: ANN401 - YAML
        pairs = [{"name": "half", "sft": sft, "reference": "half"}]
        return the(render({"checkpoints": {"pairs": pairs}}), "Deployment")["spec"]["template"]

    assert template("a") == template("a") != template("b")


def test_a_newer_chart_alone_restarts_nothing(tmp_path: Path) -> None:
    """Loading models again takes minutes: what names the chart's version is no part of the pods."""
    newer = shutil.copytree(CHART, tmp_path / "dense-reward")
    description = (newer / "Chart.yaml").read_text("utf-8")
    (newer / "Chart.yaml").write_text(description.replace("\nversion: ", "\nversion: 9"), "utf-8")
    now, then = (the(render({}, chart=chart), "Deployment") for chart in (CHART, newer))
    assert now["metadata"]["labels"] != then["metadata"]["labels"]
    assert now["spec"] == then["spec"]


@pytest.mark.parametrize(("pre_stop_s", "drain_s", "grace_s"), [(5, 60, 75), (0, 1, 11), (20, 600, 630)])
def test_the_grace_period_is_that_of_stopping_and_draining(pre_stop_s: int, drain_s: int, grace_s: int) -> None:
    objects = render({"preStopSeconds": pre_stop_s, "settings": {"drain_s": drain_s}})
    assert service_pod(objects)["terminationGracePeriodSeconds"] == grace_s
    assert ("lifecycle" in service_container(objects)) == (pre_stop_s > 0)


@pytest.mark.parametrize("seconds", [10, 1795, 1800, 5400])
def test_a_start_may_take_as_long_as_was_said(seconds: int) -> None:
    objects = render({"startupSeconds": seconds})
    probe = service_container(objects)["startupProbe"]
    assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] < seconds + 10
    assert the(objects, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds


def test_the_default_image_is_the_version_of_the_project() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "dense-reward" / "Chart.yaml").read_text("utf-8"))
    assert service_container(render({}))["image"] == f"dense-reward:{chart['appVersion']}"


@pytest.mark.parametrize("kind", ["none", "hpa", "keda"])
def test_one_switch_chooses_what_scales(kind: str) -> None:
    scaling = {"kind": kind, "keda": {"serverAddress": "http://prometheus:9090"}, "queueTokensPerReplica": 2_000_000}
    objects = render({"autoscaling": scaling})
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
    objects = render({"autoscaling": {"kind": "hpa", "hpa": {"metricType": "external"}}})
    (metric,) = the(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["external"]["metric"]["selector"] == {"matchLabels": {"service": "rewards-dense-reward"}}


def test_secrets_are_mounted_as_files_and_named_in_settings() -> None:
    secrets = {name: {"secretName": f"my-{name.lower()}"} for name in ("apiKeys", "engineKey", "tls")}
    objects = render(secrets)
    data, pod = settings_of(objects), service_pod(objects)
    mounted = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert mounted == {"keys": "my-apikeys", "engine": "my-enginekey", "tls": "my-tls"}
    mounts = {m["name"]: m for m in service_container(objects)["volumeMounts"]}
    assert "subPath" not in mounts["keys"]  # a file under subPath would never follow the secret
    assert data["DENSE_REWARD_API_KEYS_FILE"] == f"{mounts['keys']['mountPath']}/keys.json"
    assert data["DENSE_REWARD_ENGINE_KEY_FILE"] == f"{mounts['engine']['mountPath']}/key"
    assert data["DENSE_REWARD_TLS_CERTIFICATE"] == f"{mounts['tls']['mountPath']}/tls.crt"
    assert {service_container(objects)[f"{p}Probe"]["httpGet"]["scheme"] for p in ("startup", "liveness")} == {"HTTPS"}


@pytest.mark.parametrize(
    ("source", "volume"),
    [
        ({"source": "pvc", "pvc": {"existingClaim": "runs"}}, {"persistentVolumeClaim": {"claimName": "runs"}}),
        ({"source": "s3", "s3": {"uri": "s3://b/r"}, "downloadSize": "9Gi"}, {"emptyDir": {"sizeLimit": "9Gi"}}),
        (
            {"source": "image", "image": {"reference": "r.example/run:1"}},
            {"image": {"reference": "r.example/run:1", "pullPolicy": "IfNotPresent"}},
        ),
    ],
)
def test_checkpoints_come_from_where_they_are_said_to_be(source: dict[str, Any], volume: dict[str, Any]) -> None:
    objects = render({"checkpoints": source})
    assert {"name": "checkpoints", **volume} in service_pod(objects)["volumes"]
    assert ("initContainers" in service_pod(objects)) == (source["source"] == "s3")
    data = settings_of(objects)
    assert data["DENSE_REWARD_SFT"] == "/checkpoints/sft"
    assert data["DENSE_REWARD_REFERENCE"] == "/checkpoints/reference"
    assert data["DENSE_REWARD_CHECKPOINTS_FOLDER"] == "/checkpoints"


def test_a_claim_is_made_where_none_is_named_and_outlives_the_release() -> None:
    claim = the(render({}), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert of_kind(render({"checkpoints": {"pvc": {"existingClaim": "runs"}}}), "PersistentVolumeClaim") == []


def test_the_hub_is_asked_with_a_token_from_a_secret_and_only_before_the_service_runs() -> None:
    hub = {"sft": "me/sft@v1", "reference": "me/half@v1", "runId": "mine"}
    objects = render({"checkpoints": {"source": "hub", "hub": hub}, "hf_token": {"secretName": "hub"}})
    (download,) = service_pod(objects)["initContainers"]
    assert environment(download)["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert environment(download)["HF_HOME"].startswith("/checkpoints/")  # manifests name files there
    script = (ROOT / "helm" / "dense-reward" / "files" / "adopt.sh").read_text("utf-8")
    assert download["args"][0].strip() == script.strip()
    assert set(re.findall(r"\$\{?([A-Z_]+)", script)) <= environment(download).keys()
    assert environment(service_container(objects))["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in environment(service_container(objects))


def test_several_pairs_are_listed_in_the_file_that_the_service_reads() -> None:
    pairs = [{"name": "half", "sft": "sft", "reference": "half"}, {"name": "early", "sft": "sft", "reference": "early"}]
    objects = render({"checkpoints": {"pairs": pairs}})
    data = settings_of(objects)
    assert "DENSE_REWARD_SFT" not in data
    folder, _, file = data["DENSE_REWARD_PAIRS_FILE"].rpartition("/")
    assert folder in {mount["mountPath"] for mount in service_container(objects)["volumeMounts"]}
    listed = SOURCES.validate_json(the(objects, "ConfigMap/-pairs")["data"][file])
    assert [pair.name for pair in listed] == ["half", "early"]
    assert [str(pair.reference) for pair in listed] == ["/checkpoints/half", "/checkpoints/early"]


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_vllm_alone_gets_shared_memory(engine: str) -> None:
    volumes = {v["name"]: v for v in service_pod(render({"settings": {"engine": engine}}))["volumes"]}
    assert ("shm" in volumes) == (engine == "vllm")
    if engine == "vllm":
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


def test_terms_of_nodes_become_their_affinity_beside_that_of_pods() -> None:
    terms = [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]
    apart = {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]}
    pod = service_pod(render({"nodeSelectorTerms": terms, "affinity": {"podAntiAffinity": apart}}))
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required == {"nodeSelectorTerms": terms}
    assert pod["affinity"]["podAntiAffinity"] == apart


def test_monitoring_is_that_of_docker() -> None:
    on = {"enabled": True}
    objects = render({"serviceMonitor": on, "prometheusRule": on, "dashboard": on, "nameOverride": "other"})
    alerts = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yaml").read_text("utf-8"))
    assert the(objects, "PrometheusRule")["spec"] == alerts
    (endpoint,) = the(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "dense-reward"}]
    assert 'up{job="dense-reward"}' in json.dumps(alerts).replace("\\", "")
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dense-reward.json").read_text("utf-8"))
    assert json.loads(the(objects, "ConfigMap/-dashboard")["data"]["dense-reward.json"]) == dashboard


def test_a_network_policy_lets_in_the_release_and_who_is_named() -> None:
    policy = {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"name": "rl"}}}]}
    named = the(render({"networkPolicy": policy}), "NetworkPolicy")["spec"]
    assert len(named["ingress"][0]["from"]) == 2
    assert [port["port"] for rule in named["egress"] for port in rule["ports"]] == [53, 53]
    downloading = render(
        {"networkPolicy": {"enabled": True}, "checkpoints": {"source": "s3", "s3": {"uri": "s3://b/r"}}}
    )
    ports = [p["port"] for rule in the(downloading, "NetworkPolicy")["spec"]["egress"] for p in rule["ports"]]
    assert 443 in ports


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_jobs_of_the_trainer_are_commands_that_it_takes(kind: str) -> None:
    """Each argument list is read by the trainer's own configuration classes, recipe and changes together."""
    values = {**example("cpu.yaml")}
    objects = render({**values, "trainer": {**values["trainer"], "kind": kind}})
    read = {}
    for spec in jobs(objects):
        (container,) = spec["template"]["spec"]["containers"]
        assert container["command"] == ["dense-reward-train"]
        name, recipe, *changes = container["args"]
        module, _, cls = JOBS[name].config.partition(":")
        read[name] = load_config(getattr(__import__(module, fromlist=[cls]), cls), config_path(recipe), changes)
    assert [str(read[name].output_dir) for name in ("sft", "dpr")] == ["/checkpoints/runs/sft", "/checkpoints/runs/dpr"]
    assert read["dpr"].service_url == read["evaluate"].service_url == "http://rewards-dense-reward:8000"


def test_the_jobs_of_a_job_set_run_one_after_the_other() -> None:
    replicated = the(render(example("cpu.yaml")), "JobSet")["spec"]["replicatedJobs"]
    waits = [[wait["name"] for wait in job.get("dependsOn", [])] for job in replicated]
    assert waits == [[], ["sft"], ["dpr"]]


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_a_changed_job_is_a_new_one_and_the_same_stays(kind: str) -> None:
    """All that is in a Job's spec is in its name: Kubernetes refuses to change it under the same one."""

    def name(values: Values | None = None, **job: object) -> str:
        made = render({**(values or {}), "trainer": {"kind": kind, "jobs": [{**JOB, **job}]}})
        return str(the(made, kind)["metadata"]["name"])

    assert name() == name() == name({"commonLabels": {"team": "rl"}}) == name({"replicaCount": 2})
    assert len({name(), name(changes=["seed=1"]), name({"tmpSize": "1Gi"}), name({"image": {"tag": "0.2.0"}})}) == 4


def test_the_trainer_asks_with_a_key_that_no_command_line_holds() -> None:
    trainer = {"kind": "Job", "jobs": [{**JOB, "job": "dpr"}], "apiKey": {"secretName": "key-of-the-trainer"}}
    (spec,) = jobs(render({"trainer": trainer}))
    (container,) = spec["template"]["spec"]["containers"]
    assert "service_url=http://trainer:$(REWARD_KEY)@rewards-dense-reward:8000" in container["args"]
    assert environment(container)["REWARD_KEY"] == {"secretKeyRef": {"name": "key-of-the-trainer", "key": "key"}}


def test_the_test_runs_the_file_that_is_tested_here() -> None:
    objects = render(fake(test={"apiKey": {"secretName": "mine"}}))
    pod = the(objects, "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    script = the(objects, "ConfigMap/-test")["data"]["ask.py"]
    assert script.strip() == (ROOT / "helm" / "dense-reward" / "files" / "ask.py").read_text("utf-8").strip()
    assert pod["spec"]["containers"][0]["args"] == ["http://rewards-dense-reward:8000", "60"]
    assert of_kind(render(fake(test={"enabled": False})), "Pod") == []


def test_the_notes_say_what_is_open_and_what_is_missing() -> None:
    assert "Whoever reaches it may ask: apiKeys.secretName" in notes({})
    assert "from outside the cluster too" in notes({"ingress": {"enabled": True}})
    assert "Whoever" not in notes({"apiKeys": {"secretName": "keys"}})
    assert "its rewards mean nothing" in notes(fake())
    assert "rewards-dense-reward-checkpoints is new and empty" in notes({})
