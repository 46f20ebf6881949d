"""Rules for every pod of the chart, for all values: no root, no escalation, no missing limit, no key."""

import json
import re
from collections.abc import Iterator

import pytest
from dense_reward.settings import ENV_PREFIX, Settings, env_name, read_settings
from random_chart_values import random_values
from rendered_chart import (
    EXAMPLES,
    Object,
    containers,
    example,
    of_kind,
    pods,
    render,
    service_container,
    service_pod,
    settings_of,
)

CASES = [*EXAMPLES, *range(30)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    case = request.param
    return render(example(case) if isinstance(case, str) else random_values(case))


def all_containers(objects: list[Object]) -> Iterator[Object]:
    for pod in pods(objects):
        yield from containers(pod)


def test_no_pod_runs_as_root(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"].get("runAsUser", 1) > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_no_container_can_escalate_or_write_its_root(objects: list[Object]) -> None:
    for container in all_containers(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        }


def test_every_container_can_write_to_tmp_and_calls_it_home(objects: list[Object]) -> None:
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "sizeLimit" in volumes["tmp"]["emptyDir"]
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(pod):
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["tmp"] == "/tmp"
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert mounts.keys() <= volumes.keys()


def test_no_pod_gets_a_token_of_the_cluster_or_names_of_services(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # the service refuses DENSE_REWARD_SERVICE_HOST


def test_every_container_asks_for_its_resources_and_bounds_its_memory(objects: list[Object]) -> None:
    for container in all_containers(objects):
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= asked.keys()
        assert "memory" in limits
        devices = asked.keys() - {"cpu", "memory", "ephemeral-storage"}
        assert {name: asked[name] for name in devices} == {name: limits[name] for name in limits if "/" in name}


def test_every_image_has_a_version(objects: list[Object]) -> None:
    images = [container["image"] for container in all_containers(objects)]
    images += [volume["image"]["reference"] for volume in service_pod(objects)["volumes"] if "image" in volume]
    for image in images:
        assert re.search(r"(@sha256:|:)[A-Za-z0-9._-]+$", image)
        assert not image.endswith(":latest")


def test_the_service_has_its_three_probes(objects: list[Object]) -> None:
    container = service_container(objects)
    engine = settings_of(objects, of_kind(objects, "Deployment")[0]["metadata"]["name"])["DENSE_REWARD_ENGINE"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    started = "/health" if engine == "remote" else "/ready"
    assert paths == {"startup": started, "liveness": "/health", "readiness": "/ready"}


def test_the_service_writes_nothing_but_to_tmp_and_shared_memory(objects: list[Object]) -> None:
    writable = {m["mountPath"] for m in service_container(objects)["volumeMounts"] if not m.get("readOnly")}
    assert writable <= {"/tmp", "/dev/shm"}


def test_a_pod_has_the_time_to_drain(objects: list[Object]) -> None:
    pod = service_pod(objects)
    name = of_kind(objects, "Deployment")[0]["metadata"]["name"]
    drain_s = int(settings_of(objects, name)["DENSE_REWARD_DRAIN_S"])
    waits = service_container(objects).get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})
    assert pod["terminationGracePeriodSeconds"] >= waits["preStop"]["sleep"]["seconds"] + drain_s + 10


def test_a_rolling_update_takes_no_replica_away(objects: list[Object]) -> None:
    strategy = of_kind(objects, "Deployment")[0]["spec"]["strategy"]
    if strategy["type"] == "RollingUpdate":
        assert strategy["rollingUpdate"]["maxUnavailable"] == 0
        assert strategy["rollingUpdate"]["maxSurge"] >= 1
    else:
        assert strategy == {"type": "Recreate"}


def test_every_environment_name_of_the_service_is_a_setting(objects: list[Object]) -> None:
    named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z0-9_]+", json.dumps(objects)))
    assert len(named) > 3
    assert named <= {env_name(name) for name in Settings.model_fields}


def test_the_service_reads_its_settings(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses each value of the ConfigMap with the service's own class."""
    data = settings_of(objects, of_kind(objects, "Deployment")[0]["metadata"]["name"])
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    read = read_settings({}, data)
    for name, value in data.items():
        setting = getattr(read, name.removeprefix(ENV_PREFIX).lower())
        assert str(setting).lower() == value.lower() or float(setting) == float(value)


def test_no_secret_is_made_or_written_into_a_config_map(objects: list[Object]) -> None:
    assert of_kind(objects, "Secret") == []
    for container in all_containers(objects):
        for variable in container["env"]:
            if re.search(r"(KEY|TOKEN|PASSWORD)(_ID)?$", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


def test_what_selects_pods_finds_those_that_serve_and_no_others(objects: list[Object]) -> None:
    """Each selector finds the pods of one Deployment, that of the replicas or of the proxy; never those of jobs."""
    selectors = [made["spec"]["selector"]["matchLabels"] for made in of_kind(objects, "Deployment")]
    selectors += [service["spec"]["selector"] for service in of_kind(objects, "Service")]
    selectors += [made["spec"]["selector"]["matchLabels"] for made in of_kind(objects, "PodDisruptionBudget")]
    selectors += [made["spec"]["podSelector"]["matchLabels"] for made in of_kind(objects, "NetworkPolicy")]
    serving = [made["spec"]["template"]["metadata"]["labels"] for made in of_kind(objects, "Deployment")]
    others = [made["metadata"]["labels"] for made in of_kind(objects, "Pod")]
    others += [made["spec"]["template"]["metadata"]["labels"] for made in of_kind(objects, "Job")]
    for selector in selectors:
        assert len([labels for labels in serving if selector.items() <= labels.items()]) == 1
        assert not any(selector.items() <= other.items() for other in others)
    components = {selector["app.kubernetes.io/component"] for selector in selectors}
    assert components == {labels["app.kubernetes.io/component"] for labels in serving}
