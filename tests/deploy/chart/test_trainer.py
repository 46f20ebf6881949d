"""The trainer's jobs, as separate Jobs and in a JobSet."""

import pytest
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.recipe_files import config_path
from rendered_chart import JOB, Values, environment, example, jobs, render, the


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_jobs_of_the_trainer_are_commands_that_it_takes(kind: str) -> None:
    """Each argument list, a recipe and its overrides, is parsed by the trainer's own configuration classes."""
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
    """A Job's name depends on its whole spec, because Kubernetes refuses to change the spec under the same name."""

    def name(values: Values | None = None, tag: str = "", **job: object) -> str:
        trainer = {"kind": kind, "jobs": [{**JOB, **job}], "image": {"tag": tag}}
        return str(the(render({**(values or {}), "trainer": trainer}), kind)["metadata"]["name"])

    assert name() == name() == name({"commonLabels": {"team": "rl"}}) == name({"image": {"tag": "0.2.0"}})
    assert len({name(), name(changes=["seed=1"]), name({"tmpSize": "1Gi"}), name(tag="0.2.0")}) == 4


def test_the_trainer_asks_with_a_key_that_neither_command_nor_environment_holds() -> None:
    trainer = {"kind": "Job", "jobs": [{**JOB, "job": "dpr"}], "apiKey": {"secretName": "key-of-the-trainer"}}
    (spec,) = jobs(render({"trainer": trainer}))
    (container,) = spec["template"]["spec"]["containers"]
    assert "service_url=http://rewards-dense-reward:8000" in container["args"]
    assert "service_key_file=/etc/dense-reward/key/key" in container["args"]
    assert {"name": "key", "mountPath": "/etc/dense-reward/key", "readOnly": True} in container["volumeMounts"]
    secret = {"secretName": "key-of-the-trainer", "defaultMode": 0o440}
    assert {"name": "key", "secret": secret} in spec["template"]["spec"]["volumes"]
    assert "KEY" not in " ".join(environment(container))


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_an_eviction_is_none_of_the_tries(kind: str) -> None:
    (spec,) = jobs(render({"trainer": {"kind": kind, "jobs": [JOB]}}))
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # Kubernetes accepts podFailurePolicy with no other restartPolicy.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_a_job_gets_the_environment_that_is_given() -> None:
    given = {"name": "HTTPS_PROXY", "value": "http://proxy:3128"}
    (spec,) = jobs(render({"env": [given], "trainer": {"kind": "Job", "jobs": [JOB]}}))
    assert given in spec["template"]["spec"]["containers"][0]["env"]
