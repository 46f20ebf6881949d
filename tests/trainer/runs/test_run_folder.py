"""The run folder: what it records, what it redacts, and which second start it refuses."""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.configs.base import JobConfig, JobOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.run_folder import (
    CONFIG_NAME,
    MetricsLog,
    check_run,
    command_line,
    open_run,
    pin,
    plot_metrics,
    redacted,
)
from pydantic import BaseModel


class ServiceOptions(JobOptions):
    api_key: str | None = None
    url: str = "http://127.0.0.1:8000"


class ExampleConfig(JobConfig):
    seed: int = 0
    service: ServiceOptions = ServiceOptions()


def test_a_run_keeps_its_configuration_versions_and_command(tmp_path: Path) -> None:
    run = open_run("example", ExampleConfig(output_dir=tmp_path / "run", seed=4))
    assert not run.resumed
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["seed"] == 4
    record = json.loads((run.folder / "run.json").read_text())
    assert record["run_id"] == run.run_id
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    assert len(record["commands"]) == 1


def test_the_same_folder_again_is_the_same_run(tmp_path: Path) -> None:
    config = ExampleConfig(output_dir=tmp_path)
    first, second = open_run("example", config), open_run("example", config)
    assert second.resumed
    assert second.run_id == first.run_id
    assert len(json.loads((tmp_path / "run.json").read_text())["commands"]) == 2


# What decides the result of a run: a resumed run with another value would be neither the old run nor the new one.
DECISIVE = re.compile(
    r"seed|batch_size|prompts_per_step|group_size|gradient_accumulation|epochs|max_steps|learning_rate"
)
OWN_JOBS = [name for name, job in JOBS.items() if ".jobs." in job.module]


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        nested = [each for each in inner if issubclass(each, BaseModel)]
        yield name
        for each in nested:
            yield from (f"{name}.{key}" for key in keys_of(each))


@pytest.mark.parametrize("job", OWN_JOBS)
def test_no_job_resumes_with_another_seed_batch_or_number_of_epochs(job: str) -> None:
    module, _, name = JOBS[job].config.partition(":")
    config: type[JobConfig] = getattr(importlib.import_module(module), name)
    decisive = {key for key in keys_of(config) if DECISIVE.search(key.rpartition(".")[2])}
    free = {key for key in decisive if key.partition(".")[0] in config.resume_may_change}
    allowed = {"dpr", "gradient"} if any(key.startswith("held_out_options") for key in free) else set()
    assert not free or (job in allowed and all(key.startswith("held_out_options.") for key in free)), free


def test_two_folders_are_two_runs(tmp_path: Path) -> None:
    runs = [open_run("example", ExampleConfig(output_dir=tmp_path / name)) for name in ("one", "two")]
    assert runs[0].run_id != runs[1].run_id


def test_a_changed_configuration_is_refused_with_its_keys_and_the_cure(tmp_path: Path) -> None:
    open_run("example", ExampleConfig(output_dir=tmp_path))
    changed = ExampleConfig(output_dir=tmp_path, seed=1, service=ServiceOptions(url="http://elsewhere"))
    values = r"\(seed: 0 -> 1, service\.url: http://127\.0\.0\.1:8000 -> http://elsewhere\)"
    with pytest.raises(ConfigError, match=rf"{values}, so its results.*use another output_dir"):
        open_run("example", changed)


def test_a_key_that_is_newer_than_the_run_had_its_default(tmp_path: Path) -> None:
    open_run("example", ExampleConfig(output_dir=tmp_path))
    path = tmp_path / CONFIG_NAME
    older = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in {"seed", "service"}}
    path.write_text(yaml.safe_dump(older))
    assert open_run("example", ExampleConfig(output_dir=tmp_path)).resumed
    path.write_text(yaml.safe_dump(older))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1"):
        open_run("example", ExampleConfig(output_dir=tmp_path, seed=1))


def test_the_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    open_run("example", ExampleConfig(output_dir=tmp_path))
    with pytest.raises(ConfigError, match="holds a run of example, not of other"):
        open_run("other", ExampleConfig(output_dir=tmp_path))


@pytest.mark.parametrize("inside", ["", "deeper", "much/deeper"])
def test_a_file_in_place_of_the_folder_is_refused_before_the_work(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'} is a file: use another output_dir"):
        check_run("example", ExampleConfig(output_dir=tmp_path / "file" / inside))


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(ConfigError, match=f"cannot write to {tmp_path}: "):
        check_run("example", ExampleConfig(output_dir=tmp_path / "new" / "run"))


def test_a_resumed_run_must_find_what_it_was_started_with(tmp_path: Path) -> None:
    run = open_run("example", ExampleConfig(output_dir=tmp_path))
    pin(run, {"data": "a", "tokenizer": "b"})
    pin(run, {"data": "a", "tokenizer": "b"})
    with pytest.raises(ConfigError, match=r"started with different inputs \(data\): restore"):
        pin(run, {"data": "c", "tokenizer": "b"})


def test_secrets_reach_neither_the_configuration_nor_the_command(tmp_path: Path) -> None:
    service = ServiceOptions(api_key="hunter2", url="https://me:hunter2@host/score")
    open_run("example", ExampleConfig(output_dir=tmp_path, service=service))
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    command = command_line(["train", "service.api_key=hunter2", "service.url=https://me:hunter2@host", "seed=1"])
    assert command.split() == [
        "train",
        "'service.api_key=[redacted]'",
        "'service.url=https://[redacted]@host'",
        "seed=1",
    ]


def test_names_that_only_resemble_secrets_are_kept() -> None:
    values = {"max_length_tokens": 5, "keys": 1, "hub_token": "x", "password": None, "tokenizer": "t"}
    assert redacted(values) == {**values, "hub_token": "[redacted]"}


def test_lines_after_the_resumed_step_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append(step, {"loss": 1.0 / step, "reward": None})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.drop_after(2)
    assert log.read() == [{"step": 1, "loss": 1.0, "reward": None}, {"step": 2, "loss": 0.5, "reward": None}]
    log.append(3, {"loss": 0.25})
    assert len(log.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_job(tmp_path: Path, value: float) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(JobError, match=r"loss is (nan|inf) at step 7: training has diverged"):
        log.append(7, {"loss": value})
    assert log.read() == []


def test_the_plot_is_a_png_even_of_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    plot_metrics(log, ("loss",), tmp_path / "empty.png", ylabel="nats")
    log.append(1, {"loss": 2.0})
    log.append(2, {"eval_loss": 1.0})
    plot_metrics(log, ("loss", "eval_loss"), tmp_path / "loss.png", ylabel="nats")
    for name in ("empty.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_line_that_a_full_disk_cut_off_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": 2.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.append(3, {"loss": 1.0})
    assert log.read() == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]
