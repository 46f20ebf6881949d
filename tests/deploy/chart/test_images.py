"""Which images the pods of the chart run."""

import re

import pytest
import yaml
from rendered_chart import CHART, EXAMPLES, JOB, ROOT, Values, example, fake, jobs, render, service_container, the

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"]
DIGEST = f"sha256:{'0a1b' * 16}"
REPOSITORY = {"service": "registry.example/dense-reward", "trainer": "registry.example/dense-reward-trainer"}


REMOTE = {"engine": "remote", "sft_url": "http://a:8000", "reference_url": "http://b:8000"}


@pytest.mark.parametrize(
    ("values", "flavour"),
    [
        ({}, "cuda"),
        ({"requestGPU": 2}, "cuda"),
        ({"requestGPU": 0}, "cpu"),
        (fake(), "cpu"),
        ({"requestGPU": 0, "settings": REMOTE}, "cpu"),
        ({"requestGPU": 8, "settings": {"engine": "vllm"}}, "vllm"),
    ],
)
def test_engine_and_gpus_choose_the_image(values: Values, flavour: str) -> None:
    assert service_container(render(values))["image"] == f"dense-reward:{VERSION}-{flavour}"


@pytest.mark.parametrize(("gpus", "flavour"), [(0, "cpu"), (1, "cuda"), (8, "cuda")])
def test_the_gpus_of_a_job_choose_its_image(gpus: int, flavour: str) -> None:
    (spec,) = jobs(render({"trainer": {"kind": "Job", "jobs": [{**JOB, "requestGPU": gpus}]}}))
    assert spec["template"]["spec"]["containers"][0]["image"] == f"dense-reward-trainer:{VERSION}-{flavour}"


@pytest.mark.parametrize(
    ("repository", "image"),
    [
        ("dense-reward", "r.example:5000/dense-reward"),
        ("team/dense-reward", "r.example:5000/team/dense-reward"),
        ("ghcr.io/team/dense-reward", "ghcr.io/team/dense-reward"),
    ],
)
def test_a_registry_for_all_charts_is_that_of_images_that_name_none(repository: str, image: str) -> None:
    values = {"global": {"imageRegistry": "r.example:5000"}, "image": {"repository": repository}}
    assert service_container(render(values))["image"] == f"{image}:{VERSION}-cuda"


def trainer_image(**images: object) -> str:
    trainer = {"kind": "Job", "jobs": [JOB], "image": images.pop("trainer", {})}
    (spec,) = jobs(render({**images, "trainer": trainer}))
    return str(spec["template"]["spec"]["containers"][0]["image"])


def test_a_flavour_of_the_services_image_is_none_of_the_trainers() -> None:
    assert trainer_image(image={"tag": f"{VERSION}-vllm"}) == f"dense-reward-trainer:{VERSION}-cpu"


def test_a_trainer_without_an_image_of_its_own_runs_the_services() -> None:
    assert trainer_image(image={"tag": "mine"}, trainer={"repository": ""}) == "dense-reward:mine"


def test_a_digest_takes_the_place_of_a_tag() -> None:
    image = {"repository": "registry.example/rewards", "tag": "1", "digest": DIGEST}
    assert service_container(render({"image": image}))["image"] == f"registry.example/rewards@{DIGEST}"
    assert trainer_image(trainer={"digest": DIGEST}) == f"dense-reward-trainer@{DIGEST}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_images_that_are_built_here_for_its_device(name: str) -> None:
    """docker/build.sh gives the tag without a flavour to the CUDA image."""
    named = re.findall(r"\b(service|trainer)-(cpu|cuda|vllm)\b", (ROOT / "docker" / "build.sh").read_text("utf-8"))
    built = {f"{REPOSITORY[kind]}:{VERSION}-{flavour}" for kind, flavour in named}
    bare = {f"{repository}:{VERSION}" for repository in REPOSITORY.values()}
    objects = render(example(name))
    run = {service_container(objects)["image"], the(objects, "Pod")["spec"]["containers"][0]["image"]}
    run |= {job["template"]["spec"]["containers"][0]["image"] for job in jobs(objects)}
    assert run <= built | bare
    has_gpu = "nvidia.com/gpu" in service_container(objects)["resources"]["requests"]
    assert all(image.endswith("-cpu") for image in run) != has_gpu


def test_the_test_may_have_an_image_of_its_own() -> None:
    def image(test: dict[str, str]) -> str:
        return str(the(render({"test": test}), "Pod")["spec"]["containers"][0]["image"])

    assert image({}) == f"dense-reward:{VERSION}-cuda"
    assert image({"image": "registry.example/dense-reward:1-cpu"}) == "registry.example/dense-reward:1-cpu"
