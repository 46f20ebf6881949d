"""The regimes study: what is matched to what, intervals over seeds, and the whole study on tiny models."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from dense_reward.serving.loaders import loader
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.studies import regimes, regimes_cell
from dense_reward_trainer.studies.flops import dpr_flops_per_token, matched_sft_steps
from dense_reward_trainer.studies.regimes_cell import Cell
from dense_reward_trainer.studies.regimes_config import SweepConfig
from dense_reward_trainer.studies.regimes_table import (
    Figures,
    at_matched_kl,
    columns_of,
    format_table,
    summarise,
)
from pydantic import ValidationError
from running_service import served
from served_pair import SIZES

pytestmark = pytest.mark.slow

PROBLEMS = {"demonstrations": 40, "digits": 1}
MILESTONES = {"reference": 0.5, "early": 0.2}
BUSY = "import time\nwhile time.process_time() < 0.3: pass"


def figures(accuracy: float, kl: float = 0.0) -> Figures:
    return Figures(accuracy, 1.0, 40.0, kl)


def config(folder: Path, **changes: object) -> SweepConfig:
    values = {
        "output_dir": folder,
        "regimes": {"noisy": {"sft": {"data.arithmetic.label_noise": 0.3}, "problems": PROBLEMS}},
        "seeds": (0, 1),
        "problems": PROBLEMS,
        "sft": {
            "scratch": SIZES.model_dump(),
            "epochs": 1,
            "batch_size": 8,
            "warmup_steps": 0,
            "log_every_steps": 1,
            "milestones": MILESTONES,
        },
        "dpr": {
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 2,
            "max_new_tokens": 8,
            "warmup_steps": 0,
            "held_out_options.max_new_tokens": 8,
            "held_out_options.limit": 2,
        },
        "columns": {"dpr_best": {"dpr": {"baseline": "none"}}, "early": {"reference": "early"}},
        "matched": "dpr_best",
        "temperatures": (1.0, 0.5),
        "evaluate": {"held_out_options.max_new_tokens": 8, "held_out_options.limit": 3},
        "threads": 1,
    }
    return SweepConfig.model_validate(values | changes)


def test_a_dpr_token_costs_what_its_parts_cost() -> None:
    assert dpr_flops_per_token(1) == 2 + 2 + 2 * 2 + 6
    assert matched_sft_steps(dpr_tokens=600, updates_per_batch=1, sft_tokens_per_step=100) == 14
    assert matched_sft_steps(dpr_tokens=600, updates_per_batch=4, sft_tokens_per_step=100) == 32
    assert matched_sft_steps(dpr_tokens=1, updates_per_batch=1, sft_tokens_per_step=100) == 1


def test_tokens_of_an_sft_run_are_counted_across_a_resumption() -> None:
    counts = [(10, 1000), (20, 1900), (30, 900), (40, 1800), (50, None)]
    lines: list[dict[str, float | None]] = [{"step": step, "num_tokens": count} for step, count in counts if count]
    assert regimes_cell.tokens_per_step([*lines, {"step": 50.0, "loss": 0.1}]) == (1900 + 900) / 30
    with pytest.raises(JobError, match=r"lower sft.log_every_steps"):
        regimes_cell.tokens_per_step([{"step": 50.0, "loss": 0.1}])


def test_the_tempered_column_is_where_its_kl_is_the_matched_one() -> None:
    curve = [figures(0.5, 0.0), figures(0.7, 1.0), figures(0.9, 3.0)]
    assert at_matched_kl(curve, 0.5).sampled_accuracy == pytest.approx(0.6)
    assert at_matched_kl(curve, 2.0) == figures(0.8, 2.0)
    assert at_matched_kl(curve, 9.0) == curve[-1]
    assert at_matched_kl(curve, -0.1) == curve[0]


def test_the_interval_of_an_accuracy_ends_at_1() -> None:
    names = ("sft", "tempered", "continued", "dpr")
    cells = [dict.fromkeys(names, figures(accuracy)) for accuracy in (0.97, 1.0, 1.0)]
    assert summarise(cells)["dpr"]["sampled_accuracy"]["high"] == 1.0
    with pytest.raises(ValueError, match="at least two seeds"):
        summarise(cells[:1])


def test_gains_are_differences_within_a_seed() -> None:
    cells = [
        {"sft": figures(0.5), "dpr": figures(0.6), "tempered": figures(0.5), "continued": figures(0.5)},
        {"sft": figures(0.8), "dpr": figures(0.9), "tempered": figures(0.8), "continued": figures(0.8)},
    ]
    assert columns_of(cells) == ["sft", "tempered", "continued", "dpr"]
    found = summarise(cells)["dpr"]["sampled_accuracy_gain"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert summarise(cells)["dpr"]["sampled_accuracy"]["low"] < 0.6
    assert "0.100 [0.100, 0.100]" in format_table({"regime": cells})


def run_here(command: Sequence[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
    """The job of a command line, in this process: imports cost more than the job."""
    assert list(command[:3]) == [sys.executable, "-m", "dense_reward_trainer.cli"]
    return subprocess.CompletedProcess(command, main(command[3:]))


@contextmanager
def serving_here(sft: Path, reference: Path, _: int, __: int | None) -> Iterator[tuple[None, str]]:
    """The service of a pair, in this process."""
    with served(loader("torch"), sft=sft, reference=reference) as running:
        yield None, str(running.client.base_url).rstrip("/")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and services of a study without processes."""
    monkeypatch.setattr(regimes_cell, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(regimes_cell, "serving", serving_here)
    for plot in ("jobs.dpr.plot_run", "jobs.sft.plot_metrics"):  # half of the time of these jobs
        monkeypatch.setattr(f"dense_reward_trainer.{plot}", lambda *_, **__: None)


@pytest.mark.usefixtures("in_this_process")
def test_the_whole_study_runs_and_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    study, folder = config(tmp_path / "run"), tmp_path / "run"
    regimes.run(study, reports.append)
    printed_table = reports[-2]
    record = json.loads((folder / "sweep.json").read_text())
    assert set(record["summary"]["noisy"]) == {"sft", "tempered", "continued", "dpr_best", "early"}
    assert (folder / "sweep.png").stat().st_size > 10_000
    sft = record["cells"]["noisy"][0]["sft"]
    assert sft["kl_to_sft"] == pytest.approx(0, abs=1e-3)
    held_out = (folder / "noisy" / "0" / "problems.jsonl").read_text()
    assert held_out != (folder / "noisy" / "1" / "problems.jsonl").read_text()

    rewards = [MetricsLog(folder / f"noisy/0/{name}/metrics.jsonl").read()[1] for name in ("dpr_best", "early")]
    assert rewards[0]["reward_sum"] != rewards[1]["reward_sum"]

    monkeypatch.setattr(regimes_cell, "run_job", None)
    (folder / "noisy" / "1" / "cpu_s.txt").write_text("1800.0\n3600.0\n")
    regimes.run(study.model_copy(update={"processes": 2}), reports.append)
    assert reports[-2] == printed_table
    assert json.loads((folder / "sweep.json").read_text())["cpu_hours"] == pytest.approx(1.5, abs=0.1)
    with pytest.raises(ConfigError, match="columns"):
        regimes.run(config(folder, columns={"dpr_best": {}}), reports.append)


def test_a_cell_that_fails_names_its_log(tmp_path: Path) -> None:
    cell = Cell(config(tmp_path / "run", sft={"epochs": 0}), "noisy", 0)
    with pytest.raises(JobError, match=r"failed with exit code 2: the error is above, in .*noisy/0/log\.txt"):
        regimes.run_cells([cell], 2, print)
    assert "epochs" in cell.log.read_text()


def test_the_cpu_time_of_a_cell_is_that_of_its_processes_also_of_those_that_fail(tmp_path: Path) -> None:
    cell = Cell(config(tmp_path), "noisy", 0)
    assert cell.cpu_s() == 0
    with regimes_cell.cpu_time_recorded(cell):
        subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert cell.cpu_s() >= 0.3
    failing = f"{BUSY}\nraise SystemExit(1)"
    with pytest.raises(subprocess.CalledProcessError), regimes_cell.cpu_time_recorded(cell):
        subprocess.run([sys.executable, "-c", failing], check=True)
    assert cell.cpu_s() >= 0.6


def test_a_reference_that_the_sft_run_does_not_leave_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"regime noisy has no milestone .late., only reference"):
        regimes.run(config(tmp_path / "run", columns={"late": {"reference": "late"}}, matched="late"), print)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"matched": "none"}, "none of the columns"),
        ({"columns": {"sft": {}}, "matched": "sft"}, "reserved for a column of the study itself"),
        ({"temperatures": (0.5, 1.0)}, "temperatures must fall"),
        ({"temperatures": (1.0, 0.5, 0.5)}, "temperatures must fall"),
        ({"columns": {"tempered_0.5": {}}, "matched": "tempered_0.5"}, "reserved for a column of the study itself"),
        ({"seeds": (0, 0)}, "list each seed once"),
        ({"seeds": (0,)}, "seeds"),
    ],
)
def test_a_study_that_means_nothing_is_refused(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config(tmp_path, **changes)


@pytest.mark.parametrize("recipe", ["regimes_sweep", "regimes_full_sweep"])
def test_the_recipe_is_what_the_jobs_take(recipe: str) -> None:
    study = load_config(SweepConfig, config_path(recipe))
    assert len(study.seeds) >= 3
    regimes.check_references([Cell(study, regime, 0) for regime in study.regimes])
    for column in study.columns.values():
        load_config(DprConfig, config_path(column.recipe), regimes_cell.arguments(study.dpr | column.dpr))
