"""The first install works: values as users write them, devices, claims and how they are filled, keys of the test."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wait
import yaml
from checked_objects import check_all
from dense_reward.manifest import Manifest
from rendered_chart import (
    CHART,
    JOB,
    KUBERNETES,
    ROOT,
    Object,
    Values,
    environment,
    jobs,
    lint,
    of_kind,
    render,
    service_container,
    service_pod,
    settings_of,
    the,
)

TYPICAL: dict[str, Values] = yaml.safe_load((ROOT / "tests" / "data" / "typical_values.yaml").read_text("utf-8"))
HUB = {"source": "hub", "hub": {"sft": "me/sft@v1", "reference": "me/half@v1", "runId": "mine"}}
TRAINED = {"kind": "Job", "jobs": [JOB]}


@pytest.mark.parametrize("values", TYPICAL.values(), ids=TYPICAL)
def test_what_a_typical_user_writes_is_taken(values: Values) -> None:
    assert lint(values) == []
    check_all(render(values), KUBERNETES[1])


def test_there_are_enough_typical_users() -> None:
    assert len(TYPICAL) >= 14


@pytest.mark.parametrize(
    ("values", "devices"),
    [
        ({}, ("cuda", None, None)),
        ({"settings": {"device": "auto"}}, ("cuda", None, None)),
        ({"requestGPU": 2}, ("cuda:0", "cuda:1", None)),
        ({"requestGPU": 2, "settings": {"device": "cuda:1", "reference_device": "cuda:0"}}, ("cuda:1", "cuda:0", None)),
        ({"requestGPU": 2, "settings": {"reference_device": "cuda:1"}}, ("cuda:0", "cuda:1", None)),
        ({"requestGPU": 1, "settings": {"device": "xpu"}}, ("xpu", None, None)),
        ({"requestGPU": 0}, (None, None, None)),
        ({"requestGPU": 1, "settings": {"engine": "vllm"}}, (None, None, "1")),
        ({"requestGPU": 2, "settings": {"engine": "vllm"}}, ("cuda:0", "cuda:1", "1")),
        ({"requestGPU": 8, "settings": {"engine": "vllm"}}, ("cuda:0,1,2,3", "cuda:4,5,6,7", "4")),
        ({"requestGPU": 8, "settings": {"engine": "vllm", "tensor_parallel": 8}}, (None, None, "8")),
    ],
)
def test_the_gpus_of_a_replica_are_named_and_all_used(values: Values, devices: tuple[str | None, ...]) -> None:
    """By name, a replica whose GPU does not work fails; device auto would serve on its CPUs."""
    found = settings_of(render(values))
    names = ("DEVICE", "REFERENCE_DEVICE", "TENSOR_PARALLEL")
    assert tuple(found.get(f"DENSE_REWARD_{name}") for name in names) == devices


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_job_on_several_gpus_has_a_process_on_each(gpus: int) -> None:
    (spec,) = jobs(render({"trainer": {"kind": "Job", "jobs": [{**JOB, "requestGPU": gpus}]}}))
    pod = spec["template"]["spec"]
    command = pod["containers"][0]["command"]
    if gpus > 1:
        assert command == ["torchrun", "--standalone", f"--nproc_per_node={gpus}", "-m", "dense_reward_trainer.cli"]
    else:
        assert command == ["dense-reward-train"]
    assert any(volume["name"] == "shm" for volume in pod["volumes"]) == (gpus > 1)


@pytest.mark.parametrize(
    ("values", "mode", "strategy"),
    [
        ({}, "ReadWriteOnce", "Recreate"),
        ({"strategy": "RollingUpdate"}, "ReadWriteOnce", "RollingUpdate"),
        ({"replicaCount": 2}, "ReadWriteMany", "RollingUpdate"),
        ({"trainer": TRAINED}, "ReadWriteMany", "RollingUpdate"),
        ({"autoscaling": {"kind": "hpa"}, "serviceMonitor": {"enabled": True}}, "ReadWriteMany", "RollingUpdate"),
        (
            {"replicaCount": 2, "checkpoints": {"pvc": {"pvcAccessMode": ["ReadWriteOnce"]}}},
            "ReadWriteOnce",
            "RollingUpdate",
        ),
        ({"checkpoints": HUB}, "ReadWriteOnce", "Recreate"),
    ],
)
def test_a_claim_is_one_that_every_cluster_has_unless_several_pods_need_it(
    values: Values, mode: str, strategy: str
) -> None:
    objects = render(values)
    assert the(objects, "PersistentVolumeClaim")["spec"]["accessModes"] == [mode]
    assert the(objects, "Deployment")["spec"]["strategy"]["type"] == strategy


def before(objects: list[Object]) -> list[Object]:
    found: list[Object] = service_pod(objects).get("initContainers", [])
    return found


def test_the_hub_is_downloaded_once_into_the_claim_one_version_beside_another() -> None:
    objects = render({"checkpoints": HUB, "replicaCount": 3})
    (download,) = before(objects)
    claim = the(objects, "PersistentVolumeClaim")["metadata"]["name"]
    assert {"name": "checkpoints", "persistentVolumeClaim": {"claimName": claim}} in service_pod(objects)["volumes"]
    assert "ephemeral-storage" not in download["resources"]["requests"]
    data, given = settings_of(objects), environment(download)
    assert data["DENSE_REWARD_SFT"] == f"/checkpoints/{given['SFT_FOLDER']}"
    assert data["DENSE_REWARD_REFERENCE"] == f"/checkpoints/{given['REFERENCE_FOLDER']}"
    other = {**HUB, "hub": {**HUB["hub"], "sft": "me/sft@v2"}}  # type: ignore[dict-item]
    assert settings_of(render({"checkpoints": other}))["DENSE_REWARD_SFT"] != data["DENSE_REWARD_SFT"]
    assert settings_of(render({"checkpoints": other}))["DENSE_REWARD_REFERENCE"] == data["DENSE_REWARD_REFERENCE"]


def test_pods_can_also_download_for_themselves() -> None:
    objects = render({"checkpoints": {**HUB, "hub": {**HUB["hub"], "cache": "pod"}}})  # type: ignore[dict-item]
    assert of_kind(objects, "PersistentVolumeClaim") == []
    assert {"name": "checkpoints", "emptyDir": {"sizeLimit": "100Gi"}} in service_pod(objects)["volumes"]


def test_pods_that_start_together_download_once(tmp_path: Path) -> None:
    """Two runs of the script at a time, with a program that is slow in the place of dense-reward."""
    program = tmp_path / "dense-reward"
    program.write_text(
        f'#!/bin/sh\necho "$2" >> {tmp_path}/adopted\nsleep 0.3\nwhile [ "$1" != --out ]; do shift; done\n'
        'mkdir -p "$2" && touch "$2/manifest.json"\n'
    )
    program.chmod(0o755)
    script = ["sh", "-e", str(CHART / "files" / "adopt.sh")]
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CHECKPOINTS": str(tmp_path), "SFT": "me/sft", "REFERENCE": "me/half"}
    given |= {"SFT_FOLDER": "sft", "REFERENCE_FOLDER": "half"}
    pods = [subprocess.Popen(script, env=given) for _ in range(2)]
    assert [pod.wait(60) for pod in pods] == [0, 0]
    assert (tmp_path / "adopted").read_text().split() == ["me/sft", "me/half"]


@pytest.mark.parametrize(
    ("values", "waits"),
    [
        ({}, True),
        ({"checkpoints": {"pvc": {"existingClaim": "runs"}}}, False),
        ({"checkpoints": {"pvc": {"existingClaim": "runs"}}, "trainer": TRAINED}, True),
        ({"checkpoints": HUB}, False),
    ],
)
def test_pods_wait_for_a_claim_that_is_filled_later(values: Values, waits: bool) -> None:
    commands = [container["command"] for container in before(render(values))]
    assert (["python3", "-c"] in commands) == waits


def test_pods_wait_for_the_checkpoints_of_all_pairs() -> None:
    pairs = [{"name": name, "sft": "sft", "reference": name} for name in ("half", "early")]
    (waiting,) = before(render({"checkpoints": {"pairs": pairs}}))
    assert waiting["args"][1:] == ["/checkpoints", "sft", "half", "early"]
    assert waiting["args"][0].strip() == (CHART / "files" / "wait.py").read_text("utf-8").strip()


def checkpoint(folder: Path, **fields: Any) -> Path:  # noqa: ANN401 - fields of a manifest
    """A folder with weights of 8 bytes and a manifest."""
    folder.mkdir(parents=True)
    head = json.dumps(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    (folder / "config.json").write_text("{}")
    made = Manifest(
        role="sft",
        run_id="mine",
        renderer="plain",
        end_of_turn_id=None,
        vocabulary=4,
        tokenizer_sha256="",
        template_sha256="",
        dtype="float32",
        files=dict.fromkeys(("model.safetensors", "config.json"), ""),
        probe=(),
        created_at="",
        **fields,
    )
    (folder / "manifest.json").write_text(made.model_dump_json())
    return folder


def test_a_checkpoint_is_complete_when_all_its_files_are_there_whole(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "sft")
    weights = (folder / "model.safetensors").read_bytes()
    assert wait.missing(folder) is None
    for length in (0, 5, 20, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        assert "model.safetensors is missing or incomplete" in str(wait.missing(folder))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").unlink()
    assert "config.json is missing" in str(wait.missing(folder))
    assert "no such checkpoint folder" in str(wait.missing(tmp_path / "reference"))


def test_a_pod_that_waits_says_how_to_copy_and_goes_on_when_it_is_done(tmp_path: Path) -> None:
    """The command is run here as it is logged, but for kubectl."""
    here = checkpoint(tmp_path / "here" / "sft").parent
    claim = tmp_path / "claim"
    claim.mkdir()
    script = (CHART / "files" / "wait.py").read_text("utf-8").replace("CHECK_EVERY_S = 5.0", "CHECK_EVERY_S = 0.05")
    given = {"NAMESPACE": "rl", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(claim), "sft"]
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        lines = [waiting.stdout.readline() for _ in range(3)]
        assert "no such checkpoint folder" in lines[0]
        sending, _, receiving = lines[2].strip().partition(" | ")
        kubectl, _, unpacking = receiving.partition(" -- ")
        assert kubectl.startswith("kubectl --namespace rl exec -i ")
        assert kubectl.endswith(" -c checkpoints")
        subprocess.run(f"{sending} | {unpacking}", shell=True, check=True, cwd=here)
        *_, last = waiting.stdout
        assert last == "complete: sft\n"
        assert waiting.wait(60) == 0


def test_the_test_takes_its_key_from_the_services_list() -> None:
    pod = the(render({"apiKeys": {"secretName": "keys", "secretKey": "list.json"}}), "Pod")["spec"]
    (container,) = pod["containers"]
    assert container["args"][-1] == "/keys/list.json"
    assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in container["volumeMounts"]
    assert {"name": "keys", "secret": {"secretName": "keys", "defaultMode": 0o440}} in pod["volumes"]
    named = {"apiKeys": {"secretName": "keys"}, "test": {"apiKey": {"secretName": "mine"}}}
    assert (
        environment(the(render(named), "Pod")["spec"]["containers"][0])["REWARD_KEY"]["secretKeyRef"]["name"] == "mine"
    )


def test_an_authority_of_ones_own_reaches_every_program_that_connects() -> None:
    objects = render({"caBundle": {"secretName": "authority"}, "checkpoints": HUB, "trainer": {"kind": "none"}})
    assert {"name": "ca", "secret": {"secretName": "authority"}} in service_pod(objects)["volumes"]
    for container in (service_container(objects), *before(objects)):
        assert environment(container)["SSL_CERT_FILE"] == "/etc/dense-reward/ca/ca.crt"
        assert "/etc/dense-reward/ca" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_what_is_added_to_pods_cannot_weaken_them() -> None:
    loose = {"runAsNonRoot": False, "seccompProfile": {"type": "Unconfined"}, "supplementalGroups": [7], "fsGroup": 8}
    security = service_pod(render({"podSecurityContext": loose}))["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (security["supplementalGroups"], security["fsGroup"], security["runAsUser"]) == ([7], 8, 10001)
