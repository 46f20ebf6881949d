"""The examples for schedulers: short, valid for their programs, and with settings that exist."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from dense_reward.cli import main
from dense_reward.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, SCHEMAS = ROOT / "examples", ROOT / "tests" / "data" / "schemas"


def parsed(name: str) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load((EXAMPLES / name).read_text("utf-8"))


def check_settings(given: dict[str, str]) -> None:
    names = {name.removeprefix(ENV_PREFIX).lower() for name in given if name.startswith(ENV_PREFIX)}
    assert {"sft", "reference", "device"} <= names <= Settings.model_fields.keys()


@pytest.mark.parametrize("name", ["ray_serve.py", "kserve.yaml", "sky.yaml", "slurm.sh"])
def test_an_example_is_short(name: str) -> None:
    lines = (EXAMPLES / name).read_text("utf-8").splitlines()
    assert 12 <= len([line for line in lines if line.strip()]) <= 30


@pytest.mark.parametrize(("name", "schema"), [("kserve.yaml", "InferenceService"), ("sky.yaml", "SkyPilotTask")])
def test_an_example_is_valid_for_its_program(name: str, schema: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: make test-deploy")
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text("utf-8")))
    validator.validate(parsed(name))
    assert list(validator.iter_errors({**parsed(name), "unknown": 1}))


def test_kserve_gives_a_replica_the_time_to_drain_and_asks_whether_it_is_ready() -> None:
    predictor = parsed("kserve.yaml")["spec"]["predictor"]
    (container,) = predictor["containers"]
    check_settings({variable["name"]: variable["value"] for variable in container["env"]})
    assert predictor["terminationGracePeriodSeconds"] > Settings.model_fields["drain_s"].default
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert predictor["enableServiceLinks"] is False


def test_skypilot_runs_the_service_with_settings_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    task = parsed("sky.yaml")
    check_settings(task["envs"])
    assert task["envs"]["DENSE_REWARD_API_KEYS_FILE"] in task["file_mounts"]
    assert task["setup"].endswith("--constraint constraints/default.txt")
    program, *arguments = shlex.split(task["run"].removeprefix("exec "))
    assert program == "dense-reward"
    assert arguments[arguments.index("--port") + 1] == str(task["resources"]["ports"])
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--help"])
    assert done.value.code == 0, capsys.readouterr().err
