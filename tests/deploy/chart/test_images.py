"""Which images the pods of the chart run."""

import re

import pytest
import yaml
from rendered_chart import CHART, EXAMPLES, JOB, ROOT, example, jobs, render, service_container, the

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"]
DIGEST = f"sha256:{'0a1b' * 16}"
REPOSITORY = {"service": "registry.example/dense-reward", "trainer": "registry.example/dense-reward-trainer"}


def test_the_default_image_is_the_version_of_the_project() -> None:
    assert service_container(render({}))["image"] == f"dense-reward:{VERSION}"


def trainer_image(**images: object) -> str:
    trainer = {"kind": "Job", "jobs": [JOB], "image": images.pop("trainer", {})}
    (spec,) = jobs(render({**images, "trainer": trainer}))
    return str(spec["template"]["spec"]["containers"][0]["image"])


def test_a_flavour_of_the_services_image_is_none_of_the_trainers() -> None:
    assert trainer_image(image={"tag": f"{VERSION}-vllm"}) == f"dense-reward-trainer:{VERSION}"


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

    assert image({}) == f"dense-reward:{VERSION}"
    assert image({"image": "registry.example/dense-reward:1-cpu"}) == "registry.example/dense-reward:1-cpu"
