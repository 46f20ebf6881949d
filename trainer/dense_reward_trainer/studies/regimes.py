"""The regimes study: SFT under several regimes, DPR on each, and alternatives to DPR at matched KL and FLOPs.

`dense-reward-train sweep CONFIG`. Every step is a job that a user could run, in its own process. Finished steps are not
repeated, so that a stopped sweep can be resumed.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.studies.regimes_cell import Cell, arguments, cell_figures, sft_overrides
from dense_reward_trainer.studies.regimes_config import SweepConfig
from dense_reward_trainer.studies.regimes_table import Figures, format_table, plot_sweep, summarise


def run(config: SweepConfig, report: Report) -> None:
    """Leave `sweep.json`, `sweep.png` and every job's folder in `config.output_dir`, and report a table.

    Raises ConfigError if the configuration cannot be run, JobError if a job fails; its own error is on stderr.
    """
    check_run("sweep", config)
    folder = open_run("sweep", config).folder
    cells = [Cell(config, regime, seed) for regime in config.regimes for seed in config.seeds]
    check_references(cells)
    run_cells(cells, config.processes, report)
    figures: dict[str, list[dict[str, Figures]]] = {regime: [] for regime in config.regimes}
    for cell in cells:
        figures[cell.regime].append(cell_figures(cell, report))
    record = {
        "config": config.model_dump(mode="json"),
        "cells": {
            regime: [{name: asdict(one) for name, one in columns.items()} for columns in seeds]
            for regime, seeds in figures.items()
        },
        "summary": {regime: summarise(seeds) for regime, seeds in figures.items()},
        "cpu_hours": sum(cell.cpu_s() for cell in cells) / 3600,
    }
    write_whole(folder / "sweep.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_sweep(figures, folder / "sweep.png")
    report(format_table(figures))
    report(f"{record['cpu_hours']:.2f} CPU-hours; figures, plot and all runs: {folder}")


def run_cells(cells: Sequence[Cell], processes: int, report: Report) -> None:
    """Run the cells that are not finished, `processes` of them in parallel."""
    missing = [cell for cell in cells if not cell.figures.is_file()]
    if processes > 1 and missing:
        report(f"{processes} cells in parallel; each writes its output to its own log, the first to {missing[0].log}")
        done: Iterable[object] = in_processes(processes, cell_figures_logged, missing)
    else:
        done = map(partial(cell_figures, report=report), missing)
    for _ in tqdm(done, total=len(cells), initial=len(cells) - len(missing), desc="sweep", unit="cell"):
        pass


def cell_figures_logged(cell: Cell) -> dict[str, Figures]:
    """`cell_figures` in a worker process; output of this process and its jobs goes to the cell's log from now on."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as file:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(file.fileno(), output.fileno())
    try:
        return cell_figures(cell, partial(print, flush=True))
    except JobError as error:
        raise JobError(f"{error}, in {cell.log}") from error


def check_references(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if the reference of a column is not a milestone of its SFT run."""
    for cell in cells:
        resolved = load_config(SftConfig, config_path("arithmetic_sft"), arguments(sft_overrides(cell)))
        for name, column in cell.config.columns.items():
            if column.reference not in resolved.milestones:
                raise ConfigError(
                    f"columns.{name}: the SFT run of regime {cell.regime} has no milestone {column.reference!r}, only "
                    f"{', '.join(resolved.milestones)}: name it in sft.milestones with a fraction"
                )
