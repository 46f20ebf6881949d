"""One cell of the regimes study: the jobs of one regime with one seed, each in its own process.

Read from `cell_figures` downwards.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report
from pydantic import JsonValue

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.data.arithmetic import ArithmeticOptions
from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.sources import DataSource, load, split
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.checkpoint import is_complete
from dense_reward_trainer.runs.local_service import free_port, serving
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, METRICS_NAME, MetricsLog
from dense_reward_trainer.studies.flops import matched_sft_steps
from dense_reward_trainer.studies.regimes_config import Overrides, Regime, SweepConfig
from dense_reward_trainer.studies.regimes_table import Figures, at_matched_kl


@dataclass(frozen=True, slots=True)
class Cell:
    """One regime with one seed, and the paths in its folder."""

    config: SweepConfig
    regime: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.config.output_dir / self.regime / str(self.seed)

    @property
    def figures(self) -> Path:
        """The file with the figures of all columns; it exists once the cell is finished."""
        return self.folder / "figures.json"

    @property
    def log(self) -> Path:
        """The output of the cell's jobs, if cells run in parallel."""
        return self.folder / "log.txt"

    @property
    def cpu_times(self) -> Path:
        """CPU seconds, one line for each time that the cell was worked on."""
        return self.folder / "cpu_s.txt"

    @property
    def held_out(self) -> Path:
        """The problems that no policy is trained on."""
        return self.folder / "problems.jsonl"

    @property
    def settings(self) -> Regime:
        return self.config.regimes[self.regime]

    @property
    def problems(self) -> ArithmeticOptions:
        """The problems that policies are trained and measured on."""
        return (self.settings.problems or self.config.problems).model_copy(update={"seed": self.seed})

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of the SFT run."""
        return self.folder / "sft" / "checkpoints"

    def policy(self, column: str) -> Path:
        """The checkpoint of a DPR column."""
        return self.folder / column / "checkpoints" / "policy"

    def cpu_s(self) -> float:
        """CPU seconds of all jobs of the cell and of their services."""
        return sum(float(line) for line in self.cpu_times.read_text().split()) if self.cpu_times.is_file() else 0.0


def cell_figures(cell: Cell, report: Report) -> dict[str, Figures]:
    """The figures of every column; runs the jobs that are not finished. Raises JobError if one fails."""
    if cell.figures.is_file():
        return {name: Figures(**values) for name, values in json.loads(cell.figures.read_text()).items()}
    report(f"{cell.regime}, seed {cell.seed}")
    with cpu_time_recorded(cell):
        train_sft(cell)
        for reference, columns in missing_columns(cell).items():
            with pair_served(cell, reference) as url:
                for column in columns:
                    train_dpr(cell, column, url)
        continue_sft(cell)
        with pair_served(cell, cell.config.columns[cell.config.matched].reference) as url:
            evaluation = evaluate(cell, url)
    figures = {name: Figures.of(values) for name, values in evaluation.items()}
    tempered = [figures.pop(_tempered_name(t)) for t in cell.config.temperatures]
    figures["tempered"] = at_matched_kl(tempered, figures[cell.config.matched].kl_to_sft)
    write_whole(cell.figures, json.dumps({name: asdict(one) for name, one in figures.items()}, indent=2).encode())
    return figures


def missing_columns(cell: Cell) -> dict[str, list[str]]:
    """The DPR runs that are not finished, by their reference: runs with one reference share a service."""
    missing: dict[str, list[str]] = {}
    for name, column in cell.config.columns.items():
        if not is_complete(cell.policy(name)):
            missing.setdefault(column.reference, []).append(name)
    return missing


@contextmanager
def pair_served(cell: Cell, reference: str) -> Iterator[str]:
    """The URL of a service of the SFT model and the milestone `reference` of its run."""
    pair = cell.checkpoints / "sft", cell.checkpoints / reference
    with serving(*pair, free_port(), cell.config.threads) as (_, url):
        yield url


def train_sft(cell: Cell) -> None:
    """Train the SFT model and its milestones, and write the problems that no policy is trained on."""
    run_job(cell, "sft", "sft", "arithmetic_sft", sft_overrides(cell))
    source = DataSource(source="arithmetic", held_out_fraction=cell.config.held_out_fraction, arithmetic=cell.problems)
    write_held_out(cell.held_out, split(load(source).demonstrations, source.held_out_fraction, source.seed).held_out)


def train_dpr(cell: Cell, column: str, url: str) -> None:
    """Train one DPR column."""
    overrides = _data("prompts", cell.problems, cell.config) | {
        "policy": str(cell.checkpoints / "sft"),
        "held_out": str(cell.held_out),
        "service_url": url,
    }
    settings = cell.config.columns[column]
    run_job(cell, column, "dpr", settings.recipe, overrides | cell.config.dpr | settings.dpr)


def continue_sft(cell: Cell) -> None:
    """Continue SFT from the SFT model, on the same demonstrations, for as many FLOPs as the matched column used."""
    sft_lines = MetricsLog(cell.folder / "sft" / METRICS_NAME).read()
    dpr_lines = MetricsLog(cell.folder / cell.config.matched / METRICS_NAME).read()
    matched = load_config(DprConfig, cell.folder / cell.config.matched / CONFIG_NAME)
    dpr_tokens = sum(line.get("computed_tokens") or 0.0 for line in dpr_lines)
    steps = matched_sft_steps(dpr_tokens, matched.updates_per_batch, tokens_per_step(sft_lines))
    from_sft: Overrides = {
        "base_model": str(cell.checkpoints / "sft"),
        "scratch": None,
        "milestones": {},
        "renderer": "plain",
        "epochs": 10_000,
        "max_steps": steps,
        "warmup_steps": min(10, steps - 1),
    }
    run_job(cell, "continued", "sft", "arithmetic_sft", sft_overrides(cell) | from_sft | cell.config.continued)


def tokens_per_step(lines: Sequence[Mapping[str, float | None]]) -> float:
    """The mean number of tokens in a step of an SFT run, from the lines of its metrics.

    TRL counts tokens from 0 again after a run is resumed, so intervals over which the count falls are left out.
    Raises JobError if no line has a count.
    """
    known = [((line.get("step") or 0.0), line["num_tokens"] or 0.0) for line in lines if "num_tokens" in line]
    steps = tokens = 0.0
    for (step, count), (next_step, next_count) in pairwise([(0.0, 0.0), *known]):
        if next_count >= count:
            steps += next_step - step
            tokens += next_count - count
    if not steps:
        raise JobError(
            "the SFT run logged no token counts, so no FLOPs can be matched to it: lower sft.log_every_steps"
        )
    return tokens / steps


def evaluate(cell: Cell, url: str) -> Mapping[str, Mapping[str, object]]:
    """Evaluate every column, and the SFT model at every temperature, on the held-out problems."""
    sft = str(cell.checkpoints / "sft")
    tempered = {_tempered_name(t): t for t in cell.config.temperatures}
    checkpoints = {"sft": sft, "continued": str(cell.folder / "continued" / "checkpoints" / "sft")}
    checkpoints |= {column: str(cell.policy(column)) for column in cell.config.columns}
    checkpoints |= dict.fromkeys(tempered, sft)
    overrides: Overrides = {
        "checkpoints": dict(checkpoints),
        "temperatures": dict(tempered),
        "held_out": str(cell.held_out),
        "service_url": url,
    }
    run_job(cell, "evaluation", "evaluate", "arithmetic_evaluate", overrides | cell.config.evaluate, seeded=False)
    evaluation: dict[str, dict[str, object]] = json.loads((cell.folder / "evaluation" / "evaluation.json").read_text())
    return evaluation


def run_job(cell: Cell, name: str, kind: str, recipe: str, overrides: Overrides, *, seeded: bool = True) -> None:
    """Run one job in its own process, in the folder `name` of the cell. Raises JobError if it fails."""
    folder = cell.folder / name
    always: Overrides = {"output_dir": str(folder), "threads": cell.config.threads, "device": "cpu"}
    always |= {"seed": cell.seed} if seeded else {}
    command = [sys.executable, "-m", "dense_reward_trainer.cli", kind, recipe, *arguments(always | overrides)]
    done = subprocess.run(command, env=os.environ, check=False)
    if done.returncode != 0:
        raise JobError(f"{kind} of {folder} failed with exit code {done.returncode}: the error is above")


@contextmanager
def cpu_time_recorded(cell: Cell) -> Iterator[None]:
    """Records the CPU time of the child processes that end within the block, also if it raises."""
    before_s = _children_cpu_s()
    try:
        yield
    finally:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with cell.cpu_times.open("a") as file:
            file.write(f"{_children_cpu_s() - before_s:.1f}\n")


def arguments(overrides: Overrides) -> list[str]:
    """The overrides as arguments of the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def sft_overrides(cell: Cell) -> Overrides:
    """The overrides of the recipe `arithmetic_sft` for this cell."""
    demonstrations = cell.config.problems.model_copy(update={"seed": cell.seed})
    return _data("data", demonstrations, cell.config) | cell.config.sft | cell.settings.sft


def _data(key: str, problems: ArithmeticOptions, config: SweepConfig) -> Overrides:
    options: dict[str, JsonValue] = problems.model_dump(mode="json")
    return {f"{key}.arithmetic": options, f"{key}.held_out_fraction": config.held_out_fraction}


def _tempered_name(temperature: float) -> str:
    return f"tempered_{temperature:g}"


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
