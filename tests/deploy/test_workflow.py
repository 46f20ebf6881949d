"""The CI workflows: pinned actions, existing commands, rights, and the names and versions of everything they publish."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
TEXT = WORKFLOW.read_text("utf-8")
JOBS = yaml.safe_load(TEXT)["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_every_action_is_pinned_to_a_commit_and_says_its_version() -> None:
    used = re.findall(r"uses: (.+)$", TEXT, re.MULTILINE)
    assert len(used) == sum("uses" in step for step in STEPS) > 5
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v[\d.]+", action)


def test_what_it_makes_are_targets_of_the_makefile() -> None:
    run = "\n".join(step.get("run", "") for step in STEPS)
    made = set(re.findall(r"\bmake (?:--silent )?([a-z-]+)", run))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"images", "push-images", "push-chart", "test-vllm", "install", "version"} <= made
    assert made <= targets
    assert "\n.ci/run" in run


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


@pytest.mark.parametrize(
    ("job", "made"), [("test", ".ci/run"), ("deploy-files", "make test-deploy"), ("nightly-deploy", "make rolling")]
)
def test_programs_are_installed_before_tests_that_would_skip_without_them(job: str, made: str) -> None:
    assert commands(job).index("sudo make programs") < commands(job).index(made)


def test_the_tests_of_what_is_deployed_run_all_of_them_and_name_what_takes_longer() -> None:
    listed = subprocess.run(["make", "--dry-run", "test-deploy"], cwd=ROOT, check=True, capture_output=True, text=True)
    run = set(listed.stdout.split())
    assert {f"tests/deploy/{file.name}" for file in (ROOT / "tests" / "deploy").glob("test_*.py")} <= run
    assert {"tests/test_chart_*.py", "tests/test_operations.py"} <= run
    assert all(f"make {target}" in listed.stdout for target in ("try-image", "rolling"))


def test_every_usual_image_and_that_of_vllm_is_built_scanned_and_then_pushed() -> None:
    job = JOBS["images"]
    script = (ROOT / "docker" / "build.sh").read_text("utf-8")
    (usual,) = re.findall(r"^\(\(\$#\)\) \|\| set -- (.+)$", script, re.MULTILINE)
    entries = job["strategy"]["matrix"]["include"]
    assert {entry["image"] for entry in entries} == {*usual.split(), "service-vllm"}
    assert all(entry["image"].endswith(f"-{entry['variant']}") for entry in entries)
    order = [str(step.get("run", step.get("uses", ""))).split("@")[0] for step in job["steps"]]
    wanted = ["make images", "anchore/sbom-action", "anchore/scan-action", "make push-images"]
    places = [
        next(n for n, step in enumerate(order) if step.startswith(start + " ") or step == start) for start in wanted
    ]
    assert places == sorted(places)


def named(folder: Path, reference: str) -> tuple[int, dict[str, str]]:
    """Runs the step that names the image of service-vllm for a ref. Returns its exit code and the variables it sets."""
    (step,) = [step for step in JOBS["images"]["steps"] if step.get("id") == "named"]
    script = step["run"].replace("${{ matrix.repository }}", "dense-reward").replace("${{ matrix.variant }}", "vllm")
    assert "${{" not in script
    given = {
        "GITHUB_REF": reference,
        "GITHUB_REF_NAME": reference.rpartition("/")[2],
        "GITHUB_ENV": str(folder / "set"),
    }
    given |= {"GITHUB_REPOSITORY_OWNER": "An-Owner", "GITHUB_OUTPUT": str(folder / "set"), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=given, capture_output=True, check=False)
    lines = (folder / "set").read_text().splitlines() if (folder / "set").exists() else []
    return done.returncode, dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("reference", ["refs/heads/main", f"refs/tags/v{VERSION}"])
def test_images_are_named_by_the_version_and_by_the_owner_in_small_letters(tmp_path: Path, reference: str) -> None:
    code, found = named(tmp_path, reference)
    assert code == 0
    assert found == {
        "REGISTRY": "ghcr.io/an-owner/",
        "reference": f"ghcr.io/an-owner/dense-reward:{VERSION}-vllm",
    }


@pytest.mark.parametrize("tag", ["v99.0.0", VERSION])
def test_a_tag_that_is_not_the_version_names_nothing(tmp_path: Path, tag: str) -> None:
    assert named(tmp_path, f"refs/tags/{tag}") == (1, {})


def test_the_chart_is_pushed_after_the_images_and_not_in_the_place_of_one(tmp_path: Path) -> None:
    assert JOBS["chart"]["needs"] == "images"
    helm = tmp_path / "helm"
    helm.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    helm.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pushed = ["make", "push-chart", "REGISTRY=ghcr.io/an-owner/"]
    subprocess.run(pushed, cwd=ROOT, env=environment, check=True, capture_output=True)
    package, push = (tmp_path / "calls").read_text().splitlines()
    assert package.startswith(f"package helm/dense-reward --version {VERSION} --app-version {VERSION} ")
    assert push == f"push dist/dense-reward-{VERSION}.tgz oci://ghcr.io/an-owner/charts"


def test_nobody_may_write_but_the_jobs_that_push() -> None:
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["images", "chart"]


def test_the_nightly_jobs_run_the_tests_that_others_skip() -> None:
    nightly = {name: job for name, job in JOBS.items() if job["if"] == "github.event_name == 'schedule'"}
    run = [command for name in nightly for command in commands(name)]
    assert "make test-vllm" in run
    assert ".venv/bin/pytest -m gpu" in run
