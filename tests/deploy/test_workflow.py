"""The CI workflow: pinned actions, existing commands, rights, and names and versions of everything it publishes."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
TEXT = WORKFLOW.read_text("utf-8")
JOBS = yaml.safe_load(TEXT)["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
VERSION = PROJECT["version"]


def test_every_action_is_pinned_to_a_commit_and_says_its_version() -> None:
    used = re.findall(r"uses: (.+)$", TEXT, re.MULTILINE)
    assert len(used) == sum("uses" in step for step in STEPS) > 5
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v[\d.]+", action)


def test_what_it_makes_are_targets_of_the_makefile() -> None:
    run = "\n".join(step.get("run", "") for step in STEPS)
    made = set(re.findall(r"\bmake (?:--silent )?([a-z-]+)", run))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"images", "push-images", "push-chart", "package", "test-vllm", "install", "version"} <= made
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
    assert "tests/deploy/chart" in run
    assert all(f"make {target}" in listed.stdout for target in ("try-image", "rolling"))


def test_every_usual_image_and_that_of_vllm_is_built_scanned_and_then_pushed() -> None:
    job = JOBS["images"]
    assert job["strategy"]["matrix"] == {"image": "${{ fromJSON(needs.changed.outputs.images) }}"}
    (scan,) = [step["with"] for step in job["steps"] if "scan-action" in step.get("uses", "")]
    assert scan["only-fixed"] is True, "what has no fix would fail every build"
    order = [str(step.get("run", step.get("uses", ""))).split("@")[0] for step in job["steps"]]
    wanted = ["make images", "anchore/sbom-action", "anchore/scan-action", "make push-images"]
    places = [
        next(n for n, step in enumerate(order) if step.startswith(start + " ") or step == start) for start in wanted
    ]
    assert places == sorted(places)


def images_of(commit: str, folder: Path = ROOT) -> list[str]:
    done = subprocess.run([folder / "docker" / "changed.sh", commit], check=True, capture_output=True, text=True)
    images: list[str] = json.loads(done.stdout)
    return images


def test_a_tag_builds_every_image_that_the_script_knows() -> None:
    script = (ROOT / "docker" / "build.sh").read_text("utf-8")
    known = re.findall(r"\b((?:service|trainer)-\w+)(?: \| ((?:service|trainer)-\w+))?\)", script)
    assert images_of("0" * 40) == sorted(name for names in known for name in names if name)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("docs/scale.md", []),
        ("service/dense_reward/reward.py", ["service-cpu", "trainer-cpu"]),
        ("constraints/vllm.txt", ["service-vllm"]),
        ("pyproject.toml", 7),
        ("docker/Dockerfile", 7),
    ],
)
def test_images_are_built_where_they_changed(tmp_path: Path, file: str, images: list[str] | int) -> None:
    """In a repository that has one commit more."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("secrets"))
    author = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "--message", "before")
    changed = tmp_path / file
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text("after")
    git("add", ".")
    git("commit", "--message", "after")
    found = images_of("HEAD~1", tmp_path)
    assert found == images or len(found) == images


def step_of(job: str, name: str, folder: Path, reference: str) -> tuple[int, dict[str, str]]:
    """Runs a step for a ref, for the image service-vllm. Returns its exit code and the variables that it sets."""
    (step,) = [step for step in JOBS[job]["steps"] if step.get("id") == name]
    script = step["run"]
    assert "${{" not in script
    given = {
        "GITHUB_REF": reference,
        "GITHUB_REF_NAME": reference.rpartition("/")[2],
        "GITHUB_ENV": str(folder / "set"),
    }
    given |= {
        "IMAGE": "service-vllm",
        "GITHUB_REPOSITORY_OWNER": "An-Owner",
        "GITHUB_OUTPUT": str(folder / "set"),
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=given, capture_output=True, check=False)
    lines = (folder / "set").read_text().splitlines() if (folder / "set").exists() else []
    return done.returncode, dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("reference", ["refs/heads/main", f"refs/tags/v{VERSION}"])
def test_images_are_named_by_the_version_and_by_the_owner_in_small_letters(tmp_path: Path, reference: str) -> None:
    code, found = step_of("images", "named", tmp_path, reference)
    assert code == 0
    assert found == {
        "REGISTRY": "ghcr.io/an-owner/",
        "reference": f"ghcr.io/an-owner/dense-reward:{VERSION}-vllm",
    }


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("refs/tags/v99.0.0", 1),
        (f"refs/tags/{VERSION}", 1),
        (f"refs/tags/v{VERSION}", 0),
        ("refs/heads/main", 0),
        ("refs/pull/1/merge", 0),
    ],
)
def test_a_tag_that_is_not_the_version_is_refused(tmp_path: Path, reference: str, code: int) -> None:
    assert step_of("package", "tag", tmp_path, reference) == (code, {})


def needed(job: str) -> set[str]:
    """The jobs that must succeed before a job starts, directly or through others."""
    needs = JOBS[job].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*map(needed, direct))


@pytest.mark.parametrize("job", ["images", "chart", "publish"])
def test_nothing_is_published_before_the_tests_pass_and_the_tag_is_checked(job: str) -> None:
    assert {"test", "deploy-files", "package"} <= needed(job)


def test_tags_alone_publish_the_packages_that_were_built_and_checked() -> None:
    assert JOBS["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    build = JOBS["package"]["steps"]
    assert commands("package").index("make package") == len(commands("package")) - 1
    (upload,) = [step["with"] for step in build if "upload-artifact" in step.get("uses", "")]
    listed = subprocess.run(["make", "--dry-run", "package"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"--outdir {upload['path']}\n" in listed.stdout
    assert f"twine check --strict {upload['path']}/*\n" in listed.stdout
    download, publish = JOBS["publish"]["steps"]
    assert download["with"] == {"name": upload["name"], "path": "dist"}  # the folder that the last action publishes
    assert publish["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in publish, "a password would replace trusted publishing"


def test_a_person_approves_what_is_published_on_pypi() -> None:
    """The environment's reviewers are set up on GitHub; the comment above the job describes how."""
    assert JOBS["publish"]["environment"]["name"] == "pypi"
    comment = TEXT.partition("\n  publish:\n")[0].rpartition("\n\n")[2]
    assert all(word in comment for word in ("required reviewers", "trusted publisher", "ci.yaml", "`pypi`"))


def test_every_python_that_the_project_names_is_tested() -> None:
    named = [name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if name.startswith("Programming Language")]
    strategy = JOBS["test"]["strategy"]
    assert strategy == {"fail-fast": False, "matrix": {"python": named}}
    assert PROJECT["requires-python"] == f">={named[0]}"
    (setup,) = [step for step in JOBS["test"]["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"


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
    packages = {"contents": "read", "packages": "write"}
    found = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert found == {"publish": {"id-token": "write"}, "images": packages, "chart": packages}


def test_the_nightly_jobs_run_the_tests_that_others_skip() -> None:
    nightly = {name: job for name, job in JOBS.items() if job["if"] == "github.event_name == 'schedule'"}
    run = [command for name in nightly for command in commands(name)]
    assert "make test-vllm" in run
    assert ".venv/bin/pytest -m gpu" in run


def top_level(name: str) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_hooks_before_a_commit_are_pinned_and_run_the_same_ruff_and_mypy_as_ci() -> None:
    repositories = {entry["repo"].rpartition("/")[2]: entry for entry in top_level(".pre-commit-config.yaml")["repos"]}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", entry["rev"]) for name, entry in repositories.items() if name != "local")
    pinned = (ROOT / "constraints" / "default.txt").read_text("utf-8").splitlines()
    assert f"ruff=={repositories['ruff-pre-commit']['rev'].removeprefix('v')}" in pinned
    (types,) = repositories["local"]["hooks"]
    assert types["entry"] == "make types"


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = top_level("CITATION.cff")
    assert (citation["cff-version"], citation["title"], citation["version"]) == ("1.2.0", PROJECT["name"], VERSION)
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2510.02493"


def test_reports_of_vulnerabilities_stay_private() -> None:
    assert "(../../security/advisories/new)" in (ROOT / "SECURITY.md").read_text("utf-8")


def test_artifact_hub_lists_the_chart_where_it_is_pushed() -> None:
    text = (ROOT / "artifacthub-repo.yml").read_text("utf-8")
    assert yaml.safe_load(text) == {"ignore": []}
    assert "oci://ghcr.io/OWNER/charts/dense-reward" in text
