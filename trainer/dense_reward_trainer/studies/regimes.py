"""Where does DPR add something? SFT under several regimes, DPR on each, and what the same effort does elsewhere.

`dense-reward-train sweep CONFIG`. Every step is a job that a user would type, in a process of its own; what is finished
is not done again, so that a sweep that was stopped goes on. Read from `run` downwards.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from dense_reward.checkpoints.write_manifest import write_whole
from dense_reward.records import Report
from pydantic import JsonValue
from tqdm import tqdm

from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.arithmetic import ArithmeticOptions
from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.sources import DataSource, load, split
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.checkpoint import is_complete
from dense_reward_trainer.runs.local_service import free_port, serving
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, METRICS_NAME, MetricsLog, check_run, open_run
from dense_reward_trainer.studies.flops import matched_sft_steps
from dense_reward_trainer.studies.regimes_config import Overrides, Regime, SweepConfig
from dense_reward_trainer.studies.regimes_table import Figures, at_matched_kl, plot_sweep, summary, table

LOG_NAME = "log.txt"


@dataclass(frozen=True, slots=True)
class Cell:
    """One regime with one seed, and its folder."""

    config: SweepConfig
    regime: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.config.output_dir / self.regime / str(self.seed)

    @property
    def figures(self) -> Path:
        """Where the figures of all its columns are kept."""
        return self.folder / "figures.json"

    @property
    def log(self) -> Path:
        """What its jobs say, where cells are computed side by side."""
        return self.folder / LOG_NAME

    @property
    def settings(self) -> Regime:
        return self.config.regimes[self.regime]

    @property
    def problems(self) -> ArithmeticOptions:
        """What policies meet."""
        return (self.settings.problems or self.config.problems).model_copy(update={"seed": self.seed})

    @property
    def checkpoints(self) -> Path:
        """Of the SFT run."""
        return self.folder / "sft" / "checkpoints"

    def policy(self, column: str) -> Path:
        """The checkpoint of a DPR column."""
        return self.folder / column / "checkpoints" / "policy"


def run(config: SweepConfig, report: Report) -> None:
    """Leave `sweep.json`, `sweep.png` and every job's folder in `config.output_dir`, and report a table.

    Raises JobError where a job fails; it has said why on stderr.
    """
    check_run("sweep", config)
    folder = open_run("sweep", config).folder
    cells = [Cell(config, regime, seed) for regime in config.regimes for seed in config.seeds]
    check_references(cells)
    compute(cells, config.processes, report)
    found: dict[str, list[dict[str, Figures]]] = {regime: [] for regime in config.regimes}
    for cell in cells:
        found[cell.regime].append(figures_of(cell, report))
    record = {
        "config": config.model_dump(mode="json"),
        "cells": {regime: [{n: asdict(f) for n, f in one.items()} for one in seeds] for regime, seeds in found.items()},
        "summary": {regime: summary(seeds) for regime, seeds in found.items()},
        "cpu_hours": sum(spent_s(cell) for cell in cells) / 3600,
    }
    write_whole(folder / "sweep.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_sweep(found, folder / "sweep.png")
    report(table(found))
    report(f"{record['cpu_hours']:.2f} CPU-hours; figures, plot and all runs: {folder}")


def compute(cells: Sequence[Cell], processes: int, report: Report) -> None:
    """The figures of all cells, kept in their folders."""
    missing = [cell for cell in cells if not cell.figures.is_file()]
    if processes > 1 and missing:
        report(f"{processes} cells side by side; their jobs tell of themselves in {missing[0].log} and the like")
        done: Iterable[object] = in_processes(processes, figures_apart, missing)
    else:
        done = map(partial(figures_of, report=report), missing)
    for _ in tqdm(done, total=len(cells), initial=len(cells) - len(missing), desc="sweep", unit="cell"):
        pass


def figures_apart(cell: Cell) -> dict[str, Figures]:
    """In a process whose output, and that of all that it starts, goes to the cell's log from here on."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as file:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(file.fileno(), output.fileno())
    try:
        return figures_of(cell, partial(print, flush=True))
    except JobError as error:
        raise JobError(f"{error}, in {cell.log}") from error


def figures_of(cell: Cell, report: Report) -> dict[str, Figures]:
    """All columns of one cell, computed where they are not there yet."""
    if cell.figures.is_file():
        return {name: Figures(**values) for name, values in json.loads(cell.figures.read_text()).items()}
    report(f"{cell.regime}, seed {cell.seed}")
    with noted_cpu(cell):
        train_sft(cell)
        for reference, columns in missing_columns(cell).items():
            with served(cell, reference) as url:
                for column in columns:
                    train_dpr(cell, column, url)
        continue_sft(cell)
        with served(cell, cell.config.columns[cell.config.matched].reference) as url:
            measured = evaluate(cell, url)
    figures = {name: Figures.of(values) for name, values in measured.items()}
    tempered = [figures.pop(_tempered_name(t)) for t in cell.config.temperatures]
    figures["tempered"] = at_matched_kl(tempered, figures[cell.config.matched].kl_to_sft)
    write_whole(cell.figures, json.dumps({name: asdict(one) for name, one in figures.items()}, indent=2).encode())
    return figures


def missing_columns(cell: Cell) -> dict[str, list[str]]:
    """The DPR runs that are not finished, by their reference: one service answers all of one."""
    missing: dict[str, list[str]] = {}
    for name, column in cell.config.columns.items():
        if not is_complete(cell.policy(name)):
            missing.setdefault(column.reference, []).append(name)
    return missing


@contextmanager
def served(cell: Cell, reference: str) -> Iterator[str]:
    """The address of a service of the SFT model and this milestone of its run."""
    pair = cell.checkpoints / "sft", cell.checkpoints / reference
    with serving(*pair, free_port(), cell.config.threads) as (_, url):
        yield url


def check_references(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where a column's reference is none of the checkpoints that its SFT run will leave."""
    for cell in cells:
        resolved = load_config(SftConfig, config_path("arithmetic_sft"), arguments(_sft(cell)))
        for name, column in cell.config.columns.items():
            if column.reference not in resolved.milestones:
                raise ConfigError(
                    f"columns.{name}: the SFT run of regime {cell.regime} has no milestone {column.reference!r}, only "
                    f"{', '.join(resolved.milestones)}: name it in sft.milestones with a fraction"
                )


def train_sft(cell: Cell) -> None:
    """The SFT run and its milestones, and the problems that are held out from every policy."""
    job(cell, "sft", "sft", "arithmetic_sft", _sft(cell))
    source = DataSource(source="arithmetic", held_out_fraction=cell.config.held_out_fraction, arithmetic=cell.problems)
    write_held_out(_held_out(cell), split(load(source).demonstrations, source.held_out_fraction, source.seed).held_out)


def train_dpr(cell: Cell, column: str, url: str) -> None:
    """One DPR column."""
    overrides = _data("prompts", cell.problems, cell.config) | {
        "policy": str(cell.checkpoints / "sft"),
        "held_out": str(_held_out(cell)),
        "service_url": url,
    }
    settings = cell.config.columns[column]
    job(cell, column, "dpr", settings.recipe, overrides | cell.config.dpr | settings.dpr)


def continue_sft(cell: Cell) -> None:
    """SFT that goes on from the SFT model on the same demonstrations, for as many FLOPs as the matched column took."""
    sft_lines = MetricsLog(cell.folder / "sft" / METRICS_NAME).read()
    dpr_lines = MetricsLog(cell.folder / cell.config.matched / METRICS_NAME).read()
    matched = load_config(DprConfig, cell.folder / cell.config.matched / CONFIG_NAME)
    dpr_tokens = sum(line.get("computed_tokens") or 0.0 for line in dpr_lines)
    steps = matched_sft_steps(dpr_tokens, matched.updates_per_batch, tokens_per_step(sft_lines))
    from_there: Overrides = {
        "base_model": str(cell.checkpoints / "sft"),
        "scratch": None,
        "milestones": {},
        "renderer": "plain",
        "epochs": 10_000,
        "max_steps": steps,
        "warmup_steps": min(10, steps - 1),
    }
    job(cell, "continued", "sft", "arithmetic_sft", _sft(cell) | from_there | cell.config.continued)


def tokens_per_step(lines: Sequence[Mapping[str, float | None]]) -> float:
    """Of an SFT run, on average. TRL counts tokens from 0 again where a run was resumed.

    Raises JobError where none were noted.
    """
    known = [((line.get("step") or 0.0), line["num_tokens"] or 0.0) for line in lines if "num_tokens" in line]
    steps = tokens = 0.0
    for (step, count), (next_step, next_count) in pairwise([(0.0, 0.0), *known]):
        if next_count >= count:
            steps += next_step - step
            tokens += next_count - count
    if not steps:
        raise JobError("the SFT run noted no tokens, so nothing can be matched to it: lower sft.log_every_steps")
    return tokens / steps


def evaluate(cell: Cell, url: str) -> Mapping[str, Mapping[str, object]]:
    """Every column, and the SFT model at every temperature, on the held-out problems."""
    sft = str(cell.checkpoints / "sft")
    tempered = {_tempered_name(t): t for t in cell.config.temperatures}
    checkpoints = {"sft": sft, "continued": str(cell.folder / "continued" / "checkpoints" / "sft")}
    checkpoints |= {column: str(cell.policy(column)) for column in cell.config.columns}
    checkpoints |= dict.fromkeys(tempered, sft)
    overrides: Overrides = {
        "checkpoints": dict(checkpoints),
        "temperatures": dict(tempered),
        "held_out": str(_held_out(cell)),
        "service_url": url,
    }
    job(cell, "evaluation", "evaluate", "arithmetic_evaluate", overrides | cell.config.evaluate, seeded=False)
    measured: dict[str, dict[str, object]] = json.loads((cell.folder / "evaluation" / "evaluation.json").read_text())
    return measured


def job(cell: Cell, name: str, kind: str, recipe: str, overrides: Overrides, *, seeded: bool = True) -> None:
    """One job in a process of its own. Raises JobError where it fails."""
    folder = cell.folder / name
    always: Overrides = {"output_dir": str(folder), "threads": cell.config.threads, "device": "cpu"}
    always |= {"seed": cell.seed} if seeded else {}
    command = [sys.executable, "-m", "dense_reward_trainer.cli", kind, recipe, *arguments(always | overrides)]
    done = subprocess.run(command, env=os.environ, check=False)
    if done.returncode != 0:
        raise JobError(f"{kind} of {folder} failed with exit code {done.returncode}: it says why above")


@contextmanager
def noted_cpu(cell: Cell) -> Iterator[None]:
    """Notes the CPU time of the processes that ended within, however it is left."""
    before_s = _children_s()
    try:
        yield
    finally:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with (cell.folder / "cpu_s.txt").open("a") as file:
            file.write(f"{_children_s() - before_s:.1f}\n")


def spent_s(cell: Cell) -> float:
    """CPU seconds of all jobs of a cell and of the services that they asked."""
    file = cell.folder / "cpu_s.txt"
    return sum(float(line) for line in file.read_text().split()) if file.is_file() else 0.0


def arguments(overrides: Overrides) -> list[str]:
    """As they are typed after a recipe's name."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def _sft(cell: Cell) -> Overrides:
    demonstrations = cell.config.problems.model_copy(update={"seed": cell.seed})
    return _data("data", demonstrations, cell.config) | cell.config.sft | cell.settings.sft


def _data(key: str, problems: ArithmeticOptions, config: SweepConfig) -> Overrides:
    options: dict[str, JsonValue] = problems.model_dump(mode="json")
    return {f"{key}.arithmetic": options, f"{key}.held_out_fraction": config.held_out_fraction}


def _held_out(cell: Cell) -> Path:
    return cell.folder / "problems.jsonl"


def _tempered_name(temperature: float) -> str:
    return f"tempered_{temperature:g}"


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
