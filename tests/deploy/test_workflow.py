"""The example of CI: every action is pinned to a commit, and what it runs exists."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
TEXT = WORKFLOW.read_text("utf-8")
JOBS = yaml.safe_load(TEXT)["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def test_every_action_is_pinned_to_a_commit_and_says_its_version() -> None:
    used = re.findall(r"uses: (.+)$", TEXT, re.MULTILINE)
    assert len(used) == sum("uses" in step for step in STEPS) > 5
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v[\d.]+", action)


def test_what_it_makes_are_targets_of_the_makefile() -> None:
    commands = "\n".join(step.get("run", "") for step in STEPS)
    made = set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"images", "push-images", "test-vllm", "install"} <= made
    assert made <= targets
    assert "\n.ci/run" in commands


def test_every_usual_image_is_built_scanned_and_then_pushed() -> None:
    job = JOBS["images"]
    script = (ROOT / "docker" / "build.sh").read_text("utf-8")
    (usual,) = re.findall(r"^\(\(\$#\)\) \|\| set -- (.+)$", script, re.MULTILINE)
    assert [entry["image"] for entry in job["strategy"]["matrix"]["include"]] == usual.split()
    order = [str(step.get("run", step.get("uses", ""))).split("@")[0] for step in job["steps"]]
    wanted = ["make images", "anchore/sbom-action", "anchore/scan-action", "make push-images"]
    places = [
        next(n for n, step in enumerate(order) if step.startswith(start + " ") or step == start) for start in wanted
    ]
    assert places == sorted(places)


def test_nobody_may_write_but_the_job_that_pushes() -> None:
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["images"]


def test_the_nightly_jobs_run_the_tests_that_others_skip() -> None:
    nightly = {name: job for name, job in JOBS.items() if job["if"] == "github.event_name == 'schedule'"}
    commands = [step["run"] for job in nightly.values() for step in job["steps"] if "run" in step]
    assert "make test-vllm" in commands
    assert ".venv/bin/pytest -m gpu" in commands
