"""The whole regimes study on tiny models; its jobs run in this process, because imports cost more than the jobs."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import cast

import pytest
import yaml
from dense_reward.serving.loaders import loader
from dense_reward_trainer.cli import main
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.checkpoint import is_complete
from dense_reward_trainer.runs.full_disk import reports_full_disk
from dense_reward_trainer.studies.regimes import jobs as regimes_jobs
from dense_reward_trainer.studies.regimes import study as regimes
from dense_reward_trainer.studies.regimes.cell import Cell, Job, arguments, seeded_job
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.policies import AnyPolicy, DprPolicy
from dense_reward_trainer.studies.regimes.tuning import Choice, tuned
from limited_files import no_file_beyond
from pydantic import JsonValue
from running_service import served
from served_pair import SIZES

pytestmark = pytest.mark.slow

TASK = {
    "name": "mixed_demonstrators",
    "base_novices": 0.5,
    "sft_novices": 0.25,
    "base_demonstrations": 16,
    "demonstrations": 16,
    "test": 8,
}
TINY_SFT: dict[str, JsonValue] = {
    "scratch": SIZES.model_dump(),
    "epochs": 1,
    "batch_size": 8,
    "warmup_steps": 0,
    "log_every_steps": 1,
}
POLICIES: Mapping[str, object] = {
    "dpr": {"kind": "dpr", "reference": "base", "grid": {"learning_rate": [1e-4, 1e-2]}},
    "continued": {"kind": "sft", "matched_flops": "dpr"},
    "cold": {"kind": "matched_kl", "to": "dpr", "values": [1.0, 0.5]},
    "majority": {"kind": "sampled", "options": {"choose": {"samples": 2, "by": "majority"}}},
}


def config(folder: Path, **changes: object) -> SweepConfig:
    values: dict[str, object] = {
        "output_dir": folder,
        "regimes": {"mixed": {"task": TASK}},
        "seeds": (1, 2),
        "tuning": {"seeds": (1000,)},
        "base": TINY_SFT,
        "sft": {**TINY_SFT, "milestones": {"base": 0.0, "half": 0.5}},
        "dpr": {"steps": 2, "prompts_per_step": 2, "max_new_tokens": 8, "warmup_steps": 0},
        "evaluate": {"held_out_options.max_new_tokens": 8, "held_out_options.samples_per_prompt": 1},
        "preview": {"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        "labelled": 3,
        "policies": POLICIES,
        "primary": "dpr",
    }
    return SweepConfig.model_validate(values | changes)


@contextmanager
def no_space_for(name: str) -> Iterator[None]:
    """Within the block, the disk is full whenever a file of this name is written."""
    replace = Path.replace

    def without_space(partial: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(partial, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", without_space)
        yield


class JobsHere:
    """Runs jobs in this process, and counts them by cell and name. The one that `fails` finds a full disk."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: str | None = None

    def run(self, cell: Cell, job: Job) -> None:
        self.ran.append(f"{cell.seed}/{job.name}")
        command, errors = [job.kind, job.recipe, *arguments(job.overrides)], list[str]()
        if self.ran[-1] == self.fails:
            with no_space_for("evaluation.json"):
                main(command, errors.append)
            raise JobError(errors[0])
        assert main(command) == 0


@contextmanager
def serving_here(folder: Path, _: int, __: int | None = None) -> Iterator[tuple[None, str]]:
    """The service of a run, in this process."""
    with served(loader("torch"), run=folder, device="cpu") as running:
        yield None, str(running.client.base_url).rstrip("/")


@contextmanager
def serving_head_here(folder: Path, _: int, __: int | None = None) -> Iterator[tuple[None, str]]:
    """The service of a token head, in this process."""
    with served(loader("torch"), token_head=folder, device="cpu") as running:
        yield None, str(running.client.base_url).rstrip("/")


def cells_here(_: int, __: Callable[[Cell], CellFigures], cells: Sequence[Cell]) -> Iterator[CellFigures]:
    return (regimes_jobs.cell_figures(cell, print) for cell in cells)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> JobsHere:
    """Jobs and services of a study without processes."""
    found = JobsHere()
    monkeypatch.setattr(regimes_jobs, "run_job", found.run)
    monkeypatch.setattr(regimes_jobs, "serving_run", serving_here)
    monkeypatch.setattr(regimes_jobs, "serving_head", serving_head_here)
    monkeypatch.setattr(regimes, "in_processes", cells_here)
    for name in ("jobs.dpr.plot_run", "jobs.sft.plot_metrics", "jobs.preview.plot_preview"):
        monkeypatch.setattr(f"dense_reward_trainer.{name}", lambda *_, **__: None)
    return found


def read(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    return cast(dict[str, dict[str, dict[str, object]]], json.loads(path.read_text()))


def test_the_whole_study_runs_resumes_and_is_not_done_twice(tmp_path: Path, jobs: JobsHere) -> None:
    reports: list[str] = []
    study, folder = config(tmp_path / "run"), tmp_path / "run"
    jobs.fails = "2/evaluation"
    with pytest.raises(JobError, match=r"mixed/2/evaluation: a file .* because the disk is full"):
        regimes.run(study, reports.append)
    jobs.fails = None
    before = len(jobs.ran)
    with pytest.raises(ConfigError, match="no regime has two finished seeds yet"):
        regimes.run(config(folder, finished_only=True), reports.append)
    regimes.run(study, reports.append)
    assert jobs.ran[before:] == ["2/base_model", "2/sft", "2/preview", "2/continued", "2/evaluation"]
    report = f"dense-reward-train report {folder} --output {folder}/report.html"
    assert reports[-1] == f"finished: {folder / 'sweep.json'}; next: {report}"
    record = read(folder / "sweep.json")
    assert set(record["summary"]["mixed"]) == {"sft", "dpr", "continued", "cold", "majority"}
    chosen = cast(dict[str, object], record["tuning"]["mixed"]["dpr"])["chosen"]
    for seed in (1, 2):
        here = folder / "mixed" / str(seed)
        assert yaml.safe_load((here / "dpr" / "config.yaml").read_text())["learning_rate"] == chosen
        started = yaml.safe_load((here / "continued" / "config.yaml").read_text())
        assert (started["base_model"], started["scratch"]) == (str(here / "sft" / "checkpoints" / "sft"), None)
        assert not (folder / "mixed" / "1000" / "preview").exists()
        tested, labelled = (
            (here / "task" / name).read_text().splitlines() for name in ("test.jsonl", "labelled.jsonl")
        )
        assert (len(tested), len(labelled)) == (5, 3)
        assert not set(tested) & set(labelled)
    cell = CellFigures.of(read(folder / "mixed" / "1" / "figures.json"))
    assert cell.policies["sft"].kl_to_sft == pytest.approx(0, abs=1e-3)
    assert cell.demonstrations_right == 0.75
    assert cell.start is not None
    assert len(record["preview"]) == 2
    assert len(record["commits"]) == 1
    assert {path.name for path in folder.glob("*.png")} == {"sweep.png"}

    jobs.ran.clear()
    picture = (folder / "sweep.png").read_bytes()
    with no_space_for("sweep.json"), pytest.raises(JobError, match="disk is full"), reports_full_disk(folder):
        regimes.run(study, reports.append)
    assert (read(folder / "sweep.json"), (folder / "sweep.png").read_bytes()) == (record, picture)
    regimes.run(study.model_copy(update={"processes": 2}), reports.append)
    assert jobs.ran == []
    assert read(folder / "sweep.json")["cells"] == record["cells"]
    a_moved_study_is_the_same_and_other_values_are_refused(folder, tmp_path, cell, cast(float, chosen))


def a_moved_study_is_the_same_and_other_values_are_refused(
    folder: Path, tmp_path: Path, cell: CellFigures, chosen: float
) -> None:
    recipe = tmp_path / "dpr.yaml"
    shipped = yaml.safe_load(config_path("arithmetic_dpr").read_text())
    recipe.write_text(yaml.safe_dump(shipped))
    values = {**POLICIES, "dpr": {**cast(dict[str, object], POLICIES["dpr"]), "recipe": str(recipe)}}
    moved = folder.rename(tmp_path / "moved")
    study = config(moved, policies=values)
    finished = Cell(study, "mixed", 1, policies_with(study, chosen))
    assert regimes_jobs.cell_figures(finished, print) == cell
    recipe.write_text(yaml.safe_dump({**shipped, "kl_coefficient": 0.5}))
    with pytest.raises(ConfigError, match=r"moved/mixed/1 was finished with other values \(dpr: kl_coefficient\)"):
        regimes_jobs.cell_figures(finished, print)
    finished.figures.unlink()
    with pytest.raises(ConfigError, match=r"moved/mixed/1/dpr was finished with other values \(kl_coefficient\)"):
        regimes_jobs.train_dpr(finished, regimes_jobs.dpr_job(finished, "dpr", dpr_of(finished), "http://unused"))


def test_self_play_and_rft_are_policies_of_a_study_and_every_reward_is_measured(tmp_path: Path, jobs: JobsHere) -> None:
    policies: Mapping[str, object] = {
        "dpr": {"kind": "dpr", "reference": "base"},
        "spin": {"kind": "irft", "recipe": "arithmetic_irft_tiny", "options": {"generation.max_new_tokens": 8}},
        "rft": {
            "kind": "rft",
            "recipe": "arithmetic_rft_tiny",
            "options": {"max_new_tokens": 8, "head.warmup_steps": 0},
        },
    }
    study = config(
        tmp_path / "run",
        policies=policies,
        tuning=None,
        preview=None,
        labelled=0,
        credit={"corruptions": ["digit"], "answers": 4, "samples": 8, "max_new_tokens": 8},
    )
    reports: list[str] = []
    regimes.run(study, reports.append)
    assert [name for name in jobs.ran if name.startswith("1/")][-7:] == [
        "1/dpr",
        "1/spin",
        "1/rft",
        "1/credit--sft",
        "1/credit--spin",
        "1/credit--rft",
        "1/evaluation",
    ]
    record = read(tmp_path / "run" / "sweep.json")
    rewards = cast(dict[str, dict[str, dict[str, dict[str, float]]]], record["rewards"]["mixed"])
    assert {"sft_logprob", "reward:base", "reward:half"} <= rewards["sft"].keys()
    assert {"reward:round_0", "reward:round_1", "reward:round_2"} <= rewards["spin"].keys()
    assert "sft_logprob" not in rewards["spin"]
    assert 0.0 <= rewards["spin"]["reward:round_0"]["digit"]["value"] <= 1.0
    assert rewards["rft"].keys() == {"reward:default"}
    assert {"spin", "rft"} <= record["summary"]["mixed"].keys()
    first = Cell(study, "mixed", 1, study.all_policies)
    assert first.checkpoint("rft") == first.folder / "rft" / "checkpoints" / "policy-2"
    first.figures.unlink()
    jobs.ran.clear()
    regimes.run(study, reports.append)
    assert jobs.ran == ["1/base_model", "1/sft", "1/spin", "1/rft", "1/evaluation"]
    assert any("reward:round_0" in one for one in reports)


def policies_with(study: SweepConfig, learning_rate: float) -> dict[str, AnyPolicy]:
    """The policies once their learning rate is chosen."""
    choice = Choice("learning_rate", (learning_rate,), (0.0,), learning_rate, on_edge=False)
    return tuned(study.all_policies, {"dpr": choice})


def dpr_of(cell: Cell) -> DprPolicy:
    found = cell.policies["dpr"]
    assert isinstance(found, DprPolicy)
    return found


def job_of(cell: Cell, **overrides: JsonValue) -> Job:
    values: dict[str, JsonValue] = {
        **TINY_SFT,
        "data": {"source": "arithmetic", "held_out_fraction": 0.0, "arithmetic": {"demonstrations": 8, "digits": 1}},
        "milestones": {},
        "eval_every_steps": None,
    }
    return seeded_job(cell, "sft", "sft", "arithmetic_sft", values | overrides)


def test_a_job_is_a_process_whose_cpu_time_counts_also_if_it_fails(tmp_path: Path) -> None:
    cell = Cell(config(tmp_path), "mixed", 1, {})
    with regimes_jobs.cpu_time_recorded(cell):
        regimes_jobs.run_job(cell, job_of(cell))
    assert is_complete(cell.checkpoint("sft"))
    used_s = cell.cpu_s()
    assert used_s > 0
    with (
        pytest.raises(JobError, match=r"sft of .*/1/sft failed: .*epochs"),
        regimes_jobs.cpu_time_recorded(cell),
    ):
        regimes_jobs.run_job(cell, job_of(cell, epochs=0))
    assert cell.cpu_times.read_text().count("\n") == 2


def test_a_job_that_is_killed_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes_jobs, "main", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    cell = Cell(config(tmp_path), "mixed", 1, {})
    with pytest.raises(JobError, match=r"was ended by signal 9: .* start again with fewer processes"):
        regimes_jobs.run_job(cell, job_of(cell))


def test_a_job_that_finds_a_full_disk_says_so_also_if_its_log_is_cut_off(tmp_path: Path) -> None:
    cell = Cell(config(tmp_path), "mixed", 1, {})
    with (
        (tmp_path / "log").open("w") as log,
        redirect_stderr(log),
        no_file_beyond(100),
        pytest.raises(JobError, match=r"sft of .*/1/sft failed: .* because the disk is full"),
    ):
        regimes_jobs.run_job(cell, job_of(cell))


def test_a_cell_in_a_worker_that_fails_says_why_and_names_its_log(tmp_path: Path) -> None:
    study = config(tmp_path, base={"epochs": 0})
    cell = Cell(study, "mixed", 1, {})
    with pytest.raises(JobError, match=r"base_model failed: .*epochs.*; more in .*mixed/1/log\.txt"):
        regimes.run_cells([cell], study, "seeds", print)
    assert "epochs" in cell.log.read_text()
