"""The Compose file: every profile is valid, every container is confined, and every setting in it exists."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import pytest
import yaml
from dense_reward.settings import ENV_PREFIX, Settings
from dense_reward.waits import KILL_S

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
PROFILES = {
    "gpu": {"service"},
    **{f"gpus-{count}": {"haproxy", *(f"replica-{at}" for at in range(count))} for count in (2, 4, 8)},
    "cpu": {"service-cpu"},
    "vllm": {"service-vllm", "vllm-sft", "vllm-reference"},
    "monitoring": {"prometheus", "grafana"},
    "train": {"train"},
    "dpr": {"dpr"},
}
REPLICAS = tuple(f"replica-{at}" for at in range(8))
SINGLE = ("service", "service-cpu", "service-vllm")
FRONTS = (*SINGLE, *REPLICAS)
JOBS = ("train", "dpr")

Yaml: TypeAlias = str | int | bool | list["Yaml"] | dict[str, "Yaml"] | None
Container: TypeAlias = dict[str, Yaml]


def defaults(text: str) -> str:
    """A file's text with the defaults of all variables filled in."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


COMPOSE = yaml.safe_load(defaults((DOCKER / "compose.yaml").read_text("utf-8")))
CONTAINERS: dict[str, Container] = COMPOSE["services"]


def mapping(value: Yaml) -> dict[str, Yaml]:
    assert isinstance(value, dict)
    return value


def words(value: Yaml) -> list[str]:
    assert isinstance(value, list)
    return [str(word) for word in value]


def environment(name: str) -> dict[str, str]:
    return {key: str(value) for key, value in mapping(CONTAINERS[name].get("environment", {})).items()}


def compose_program() -> list[str]:
    """Compose 2, a plugin of docker, or Compose 1, a separate program. Skips the test if neither is installed."""
    for program in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(program[0])
            and not subprocess.run([*program, "version"], capture_output=True, check=False).returncode
        ):
            return program
    pytest.skip("neither docker compose nor docker-compose is installed")


def composed(*profiles: str, settings: Mapping[str, str] | None = None) -> dict[str, Container]:
    """The services that Compose finds in the file for these profiles."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    command = [*compose_program(), "--file", str(DOCKER / "compose.yaml"), *chosen, "config"]
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(settings or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    found: dict[str, Container] = yaml.safe_load(done.stdout)["services"]
    return found


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_takes_a_profile(profile: str) -> None:
    # Compose 1 also lists the services of inactive profiles; Compose 2 does not.
    assert PROFILES[profile] <= set(composed(profile))


def test_compose_takes_all_settings_of_the_example() -> None:
    example = (DOCKER / ".env.example").read_text("utf-8")
    settings = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE))
    services = composed("gpu", "monitoring", settings={**settings, "TAG": "9.9.9", "LISTEN": "0.0.0.0:80"})
    assert str(services["service"]["image"]).endswith("dense-reward:9.9.9-cuda")


def test_the_example_lists_what_can_be_set_with_its_default() -> None:
    used = set(re.findall(r"\$\{(\w+):-([^}]*)\}", (DOCKER / "compose.yaml").read_text("utf-8")))
    assert len(dict(used)) == len(used), "one default for each"
    listed = set(re.findall(r"^#([A-Z_]+)=(.*)$", (DOCKER / ".env.example").read_text("utf-8"), re.MULTILINE))
    assert listed == used


def test_a_profile_has_its_services() -> None:
    found: dict[str, set[str]] = {}
    for name, container in CONTAINERS.items():
        for profile in words(container["profiles"]):
            found.setdefault(profile, set()).add(name)
    assert found == PROFILES


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_image_is_pinned(name: str) -> None:
    image = str(CONTAINERS[name]["image"])
    own = re.fullmatch(rf"dense-reward(-trainer)?:{re.escape(VERSION)}-(cpu|cuda)", image)
    assert own or re.fullmatch(r"docker\.io/[\w/-]+:v?\d+\.\d+\.\d+", image)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_confined(name: str) -> None:
    container = CONTAINERS[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", str(container["user"]))
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(container)
    assert [place.partition(":")[0] for place in words(container["tmpfs"])] == ["/tmp"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_kernels_that_are_compiled_for_a_gpu_can_be_loaded_from_tmp(name: str) -> None:
    options = words(CONTAINERS[name]["tmpfs"])[0].partition(":")[2].split(",")
    # Docker mounts a tmpfs with noexec unless `exec` is named
    assert ("exec" in options) == ("deploy" in CONTAINERS[name])


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_stays_up_has_a_health_check_and_a_job_ends(name: str) -> None:
    container = CONTAINERS[name]
    if name in JOBS:
        assert container["restart"] == "no"
    else:
        assert container["restart"] == "unless-stopped"
        assert words(mapping(container["healthcheck"])["test"])[0] == "CMD"


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_secret_is_in_an_environment_or_a_command(name: str) -> None:
    for key in environment(name):
        assert not re.search("KEY|TOKEN|SECRET|PASSWORD", key) or key.endswith("_FILE"), key
    assert "@" not in " ".join(words(CONTAINERS[name].get("command", [])))


def test_every_secret_is_a_file_that_git_ignores() -> None:
    used = {secret for container in CONTAINERS.values() for secret in words(container.get("secrets", []))}
    assert used == set(COMPOSE["secrets"])
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert {"/docker/secrets/", "/docker/.env"} <= set(ignored)


@pytest.mark.parametrize("name", CONTAINERS)
def test_nothing_listens_beyond_this_host_unless_it_is_told_to(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in words(CONTAINERS[name].get("ports", [])))


@pytest.mark.parametrize("name", FRONTS)
def test_the_settings_are_those_of_the_service(name: str) -> None:
    given = {key: value for key, value in environment(name).items() if key.startswith(ENV_PREFIX)}
    settings = Settings(**{key.removeprefix(ENV_PREFIX).lower(): value for key, value in given.items()})  # type: ignore[arg-type]
    assert settings.api_keys_file == Path("/run/secrets/api_keys")
    assert (settings.engine == "remote") == (name == "service-vllm")


def test_every_setting_that_is_named_exists() -> None:
    files = [file for file in DOCKER.rglob("*") if file.is_file() and "secrets" not in file.parts]
    files += [ROOT / "docs" / "deployment.md", *(ROOT / ".github").rglob("*.yaml")]
    named = {name for file in files for name in re.findall(rf"\b{ENV_PREFIX}[A-Z_]+", file.read_text("utf-8"))}
    assert len(named) > 5
    assert {name.removeprefix(ENV_PREFIX).lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize("name", FRONTS)
def test_a_service_is_given_longer_to_stop_than_it_drains(name: str) -> None:
    drain_s = environment(name)["DENSE_REWARD_DRAIN_S"]
    assert CONTAINERS[name]["stop_grace_period"] == f"{drain_s}s{1000 * KILL_S}ms"


def test_one_variable_sets_how_long_a_service_drains_and_when_it_is_killed() -> None:
    service = composed("gpu", settings={"DRAIN_S": "45"})["service"]
    assert mapping(service["environment"])["DENSE_REWARD_DRAIN_S"] == "45"
    assert str(service["stop_grace_period"]) in {"45s10000ms", "55s"}  # Compose 1 as written, Compose 2 their sum


@pytest.mark.parametrize("name", [*FRONTS, "vllm-sft", "vllm-reference"])
def test_checkpoints_cannot_be_changed(name: str) -> None:
    assert CONTAINERS[name]["volumes"] == ["../runs/demo/checkpoints:/checkpoints:ro"]


def aliases(name: str) -> set[str]:
    networks = mapping(CONTAINERS[name]["networks"])
    return set(words(mapping(networks["default"])["aliases"]))


def test_prometheus_and_haproxy_find_every_replica_and_jobs_one_address() -> None:
    (scraped,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text("utf-8"))["scrape_configs"]
    (found,) = scraped["dns_sd_configs"]
    assert (found["names"], found["type"], found["port"]) == (["replica"], "A", 8000)
    assert "${REPLICAS-replica:8000}" in (DOCKER / "haproxy" / "haproxy.cfg").read_text("utf-8")
    assert all(aliases(name) == {"replica", "service"} for name in SINGLE)
    assert all(aliases(name) == {"replica"} for name in REPLICAS)
    assert aliases("haproxy") == {"service"}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_one_value_starts_a_replica_on_each_gpu_behind_one_address(count: int) -> None:
    services = composed(f"gpus-{count}")
    started = {name: services[name] for name in PROFILES[f"gpus-{count}"]}
    assert [name for name, container in started.items() if container.get("ports")] == ["haproxy"]
    visible = [mapping(started[name]["environment"])["CUDA_VISIBLE_DEVICES"] for name in REPLICAS[:count]]
    assert visible == [str(at) for at in range(count)]
    for name in REPLICAS[:count]:
        assert mapping(started[name]["environment"])["DENSE_REWARD_DEVICE"] == "cuda"


@pytest.mark.parametrize(
    ("settings", "visible", "devices"),
    [
        ({}, "0", ("cuda:0", "cuda:0")),
        ({"SERVICE_GPU": "0,1", "REFERENCE_DEVICE": "cuda:1"}, "0,1", ("cuda:0", "cuda:1")),
    ],
)
def test_the_models_of_a_pair_share_a_gpu_or_have_one_each(
    settings: dict[str, str], visible: str, devices: tuple[str, str]
) -> None:
    """The device is always named: `auto` could be the CPU."""
    found = mapping(composed("gpu", settings=settings)["service"]["environment"])
    assert found["CUDA_VISIBLE_DEVICES"] == visible
    assert (found["DENSE_REWARD_DEVICE"], found["DENSE_REWARD_REFERENCE_DEVICE"]) == devices


def test_a_model_of_vllm_can_have_several_gpus() -> None:
    given = {"SERVICE_GPU": "0,1,2,3", "REFERENCE_GPU": "4,5,6,7", "TENSOR_PARALLEL": "4"}
    services = composed("vllm", settings=given)
    for name, visible in (("vllm-sft", "0,1,2,3"), ("vllm-reference", "4,5,6,7")):
        command = words(services[name]["command"])
        assert command[command.index("--tensor-parallel-size") + 1] == "4"
        assert mapping(services[name]["environment"])["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("profile", ["gpu", "gpus-2", "cpu", "vllm"])
def test_the_folders_of_a_pair_have_the_names_that_its_trainer_gave_them(profile: str) -> None:
    services = composed(profile, settings={"SFT": "final", "REFERENCE": "checkpoint-50"})
    started = [services[name] for name in PROFILES[profile]]
    given = [mapping(container.get("environment", {})) for container in started]
    pairs = {(got["DENSE_REWARD_SFT"], got["DENSE_REWARD_REFERENCE"]) for got in given if "DENSE_REWARD_SFT" in got}
    assert pairs == {("/checkpoints/final", "/checkpoints/checkpoint-50")}
    models = {words(container["command"])[0] for container in started if "vllm-openai" in str(container["image"])}
    assert models == ({"/checkpoints/final", "/checkpoints/checkpoint-50"} if profile == "vllm" else set())


def test_training_has_a_process_on_each_of_its_gpus() -> None:
    train = composed("train", settings={"JOB_GPU": "0,1,2,3"})["train"]
    assert words(train["entrypoint"])[:3] == ["torchrun", "--standalone", "--nproc_per_node=gpu"]
    assert mapping(train["environment"])["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_servers_of_models_are_reached_by_the_service_alone() -> None:
    assert COMPOSE["networks"]["models"] == {"internal": True}
    for name in ("vllm-sft", "vllm-reference"):
        assert CONTAINERS[name]["networks"] == ["models"]
        assert "ports" not in CONTAINERS[name]
    urls = {environment("service-vllm")[key] for key in ("DENSE_REWARD_SFT_URL", "DENSE_REWARD_REFERENCE_URL")}
    assert urls == {"http://vllm-sft:8000", "http://vllm-reference:8000"}


def test_gpus_are_asked_for_where_the_image_has_cuda() -> None:
    for name, container in CONTAINERS.items():
        wants = "cuda" in str(container["image"]) or "vllm-openai" in str(container["image"])
        assert ("deploy" in container) == wants, name
        assert ("CUDA_VISIBLE_DEVICES" in environment(name)) == wants, name


def test_prometheus_and_grafana_get_the_files_that_are_there() -> None:
    places = dict(
        volume.split(":")[:2] for name in PROFILES["monitoring"] for volume in words(CONTAINERS[name]["volumes"])
    )
    files = {source: target for source, target in places.items() if source.startswith("./")}
    assert all((DOCKER / source).exists() for source in files)
    rules = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text("utf-8"))["rule_files"]
    assert set(rules) <= set(files.values())
    provisioned = DOCKER / "grafana" / "provisioning" / "dashboards" / "dense-reward.yaml"
    (provider,) = yaml.safe_load(provisioned.read_text("utf-8"))["providers"]
    assert f"{provider['options']['path']}/dense-reward.json" in files.values()
