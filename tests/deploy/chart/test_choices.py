"""What each switch of the chart does to the objects that it renders."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dense_reward.serving.pair_sources import SOURCES
from dense_reward.settings import Settings
from rendered_chart import (
    CHART,
    ROOT,
    environment,
    fake,
    notes,
    of_kind,
    render,
    service_container,
    service_pod,
    settings_of,
    the,
)

S3 = {"source": "s3", "s3": {"uri": "s3://bucket/run"}}
HUB = {"source": "hub", "hub": {"sft": "me/sft", "reference": "me/half", "runId": "mine"}}


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
    """Loading models again takes minutes, so labels with the chart's version must not be part of the pods."""
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


def test_a_replica_that_stops_has_the_time_for_a_full_queue() -> None:
    """Uses the tokens per second that docs/scale.md assumes for a GPU."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert defaults["settings"]["drain_s"] > Settings.model_fields["max_queue_tokens"].default / 6_600
    assert "A replica that stops answers its queued requests for 300 s" in notes({})


@pytest.mark.parametrize(
    ("values", "threads"),
    [
        ({"requestCPU": "4"}, "4"),
        ({"requestCPU": 2.5}, "2"),
        ({"requestCPU": "500m"}, "1"),
        ({"requestCPU": "2", "limitCPU": "7500m"}, "7"),
        ({"requestCPU": "4", "settings": {"threads": 3}}, "3"),
        ({"requestCPU": "4", "requestGPU": 1}, None),
    ],
)
def test_without_a_gpu_there_is_a_thread_for_each_whole_cpu(values: dict[str, Any], threads: str | None) -> None:
    assert settings_of(render({"requestGPU": 0, **values})).get("DENSE_REWARD_THREADS") == threads


@pytest.mark.parametrize("seconds", [10, 1795, 1800, 5400])
def test_a_start_may_take_as_long_as_was_said(seconds: int) -> None:
    objects = render({"startupSeconds": seconds})
    probe = service_container(objects)["startupProbe"]
    assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] < seconds + 10
    assert the(objects, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds


@pytest.mark.parametrize(("source", "seconds"), [(S3, 1800 + 7200 + 600), ({"source": "pvc"}, 1800 + 600)])
def test_a_rollout_waits_for_the_download_where_there_is_one(source: dict[str, Any], seconds: int) -> None:
    deployment = the(render({"checkpoints": {**source, "downloadSeconds": 7200}}), "Deployment")
    assert deployment["spec"]["progressDeadlineSeconds"] == seconds


@pytest.mark.parametrize("storage_class", ["", "fast"])
def test_a_download_to_the_nodes_disk_asks_for_the_room(storage_class: str) -> None:
    checkpoints = {**S3, "downloadSize": "9Gi", "downloadStorageClass": storage_class}
    (download,) = service_pod(render({"checkpoints": checkpoints}))["initContainers"]
    wanted = None if storage_class else "9Gi"
    assert download["resources"]["requests"].get("ephemeral-storage") == wanted


@pytest.mark.parametrize("source", [S3, HUB])
def test_the_service_and_its_download_get_the_environment_that_is_given(source: dict[str, Any]) -> None:
    given = {"name": "HTTPS_PROXY", "value": "http://proxy:3128"}
    pod = service_pod(render({"env": [given], "checkpoints": source}))
    assert all(given in container["env"] for container in [*pod["initContainers"], *pod["containers"]])


def test_the_deployment_has_the_annotations_that_are_given_and_its_pods_do_not() -> None:
    given = {"reloader.stakater.com/auto": "true"}
    deployment = the(render({"deploymentAnnotations": given}), "Deployment")
    assert deployment["metadata"]["annotations"] == given
    assert not given.keys() & deployment["spec"]["template"]["metadata"]["annotations"].keys()


def test_the_test_runs_where_the_service_may() -> None:
    placement = {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "gpu"},
        "runtimeClassName": "nvidia",
    }
    pod = the(render(placement), "Pod")["spec"]
    assert {key: pod[key] for key in placement} == placement


def test_secrets_are_mounted_as_files_and_named_in_settings() -> None:
    secrets = {name: {"secretName": f"my-{name.lower()}"} for name in ("apiKeys", "engineKey", "tls")}
    objects = render(secrets)
    data, pod = settings_of(objects), service_pod(objects)
    mounted = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert mounted == {"keys": "my-apikeys", "engine": "my-enginekey", "tls": "my-tls"}
    mounts = {m["name"]: m for m in service_container(objects)["volumeMounts"]}
    assert "subPath" not in mounts["keys"]  # Kubernetes never updates a file mounted with subPath
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
    assert environment(download)["HF_HOME"].startswith("/checkpoints/")  # manifests refer to files there
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


def test_the_test_runs_the_file_that_is_tested_here() -> None:
    objects = render(fake(test={"apiKey": {"secretName": "mine"}}))
    pod = the(objects, "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    script = the(objects, "ConfigMap/-test")["data"]["ask.py"]
    assert script.strip() == (ROOT / "helm" / "dense-reward" / "files" / "ask.py").read_text("utf-8").strip()
    assert pod["spec"]["containers"][0]["args"] == ["http://rewards-dense-reward:8000", "60"]
    assert of_kind(render(fake(test={"enabled": False})), "Pod") == []


def test_the_notes_say_what_is_open_and_what_is_missing() -> None:
    assert "Every caller who reaches the service is served: set apiKeys.secretName" in notes({})
    assert "from outside the cluster too" in notes({"ingress": {"enabled": True}})
    assert "Every caller" not in notes({"apiKeys": {"secretName": "keys"}})
    assert "its rewards mean nothing" in notes(fake())
    assert "The claim rewards-dense-reward-checkpoints is kept" in notes({})
    assert "exec -i deployment/rewards-dense-reward -c checkpoints -- tar -x -C /checkpoints" in notes({})
    one_node = {"replicaCount": 2, "checkpoints": {"pvc": {"pvcAccessMode": ["ReadWriteOnce"]}}}
    assert "Its access modes let pods of one node use it" in notes(one_node)
    assert "Its access modes" not in notes({"replicaCount": 2})
    assert "waits while no GPU is free" in notes({"replicaCount": 2})
    assert "waits while no GPU is free" not in notes({})
