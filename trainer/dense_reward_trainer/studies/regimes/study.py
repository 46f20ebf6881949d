"""The regimes study: SFT in several regimes, policies that use the token reward, and controls that do not.

`dense-reward-train sweep CONFIG`. Every step is a job that a user could run. Finished steps are not repeated, so that a
stopped sweep can be resumed; cells (a regime with a seed) run in parallel, or as jobs of a cluster.
"""

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report

from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.next_step import finished, report_page
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.studies.regimes.cell import Cell, check_names
from dense_reward_trainer.studies.regimes.checks import check_jobs, check_study
from dense_reward_trainer.studies.regimes.config import SweepConfig, series_name
from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.jobs import cell_figures, verdicts_of
from dense_reward_trainer.studies.regimes.plot import plot_boundary, plot_policies, plot_series
from dense_reward_trainer.studies.regimes.policies import AnyPolicy, controls
from dense_reward_trainer.studies.regimes.preview import PreviewCheck, check_previews
from dense_reward_trainer.studies.regimes.table import (
    Place,
    PrimaryResult,
    compare_primary,
    format_boundary,
    format_comparison,
    format_previews,
    format_rewards,
    format_table,
    place,
    summarise,
    summarise_rewards,
)
from dense_reward_trainer.studies.regimes.tuning import Choice, choice_lines, choose, tuned, variants


def run(config: SweepConfig, report: Report) -> None:
    """Leave `sweep.json`, pictures and every job's folder in `config.output_dir`, and report tables.

    Raises ConfigError if the configuration cannot be run, JobError with a job's own error if it fails.
    """
    check_run("sweep", config)
    check_cells(config)
    folder = open_run("sweep", config).folder
    config = config.narrowed()
    choices, cells = tune(config, report)
    policies = {regime: policies_here(config, regime, choices) for regime in config.regimes}
    reported = [Cell(config, regime, seed, policies[regime]) for regime in policies for seed in config.seeds_of(regime)]
    if config.finished_only:
        reported = finished_cells(reported, report)
    figures: dict[str, list[CellFigures]] = {cell.regime: [] for cell in reported}
    for cell, found in zip(reported, run_cells(reported, config, "seeds", report), strict=True):
        figures[cell.regime].append(found)
    cells += reported
    results = {
        regime: compare_primary(seeds, config.primary_of(regime), *controls(policies[regime]))
        for regime, seeds in figures.items()
    }
    places = boundary_places(config, figures)
    previews = preview_checks(reported, figures)
    cpu_hours = sum(cell.cpu_s() for cell in cells) / 3600
    record = sweep_record(config, choices, figures, results, places)
    record |= {"preview": [asdict(one) | {"right": one.right} for one in previews], "cpu_hours": cpu_hours}
    record |= {"commits": commits_of(cells, report)}
    write_whole(folder / "sweep.json", json.dumps(record, indent=2).encode() + b"\n")
    plot(config, figures, places, folder)
    report(format_table(figures))
    report(format_comparison(results, {regime: config.primary_of(regime) for regime in results}))
    rewards = format_rewards(figures)
    if rewards:
        report(rewards)
    if len(places) > 1:
        report(format_boundary(places))
    if previews:
        report(format_previews(previews))
    report(f"{cpu_hours:.2f} CPU-hours")
    report(finished(folder / "sweep.json", report_page(folder)))


def check_cells(config: SweepConfig) -> None:
    """Raise ConfigError, before anything runs, if the study cannot be run as it is, or would not mean what it says."""
    check_study(config)
    for regime in config.regimes:
        cells = [Cell(config, regime, config.seeds[0], config.policies_of(regime, config.all_policies))]
        if config.tuning is not None:
            here = config.policies_of(regime, config.policies)
            cells.append(Cell(config, regime, config.tuning.seeds[0], variants(here)))
        for cell in cells:
            check_names(cell)
            check_jobs(cell)


def tune(config: SweepConfig, report: Report) -> tuple[dict[str, dict[str, Choice]], list[Cell]]:
    """For each regime with its own tuning, the chosen value of each grid; and the cells that were run for it."""
    tuning = config.tuning
    if tuning is None:
        return {}, []
    own = {
        regime: config.policies_of(regime, config.policies)
        for regime in config.regimes
        if config.tuned_in(regime) == regime
    }
    cells = [
        Cell(config, regime, seed, wanted)
        for regime, policies in own.items()
        if (wanted := variants(policies))
        for seed in tuning.seeds
    ]
    figures = run_cells(cells, config, "tuning", report)
    choices: dict[str, dict[str, Choice]] = {}
    for regime, policies in own.items():
        found = [figure for cell, figure in zip(cells, figures, strict=True) if cell.regime == regime]
        choices[regime] = choose(policies, found, tuning.metric)
        for line in choice_lines(choices[regime]):
            report(f"{regime}: {line}")
    return choices, cells


def policies_here(
    config: SweepConfig, regime: str, choices: Mapping[str, Mapping[str, Choice]]
) -> dict[str, AnyPolicy]:
    """The policies of a regime with the values that were chosen for it."""
    return tuned(config.policies_of(regime, config.all_policies), choices.get(config.tuned_in(regime) or regime, {}))


def finished_cells(cells: Sequence[Cell], report: Report) -> list[Cell]:
    """The finished cells of regimes with two or more of them. Raises ConfigError if there is no such regime."""
    done = [cell for cell in cells if cell.figures.is_file()]
    counts = Counter(cell.regime for cell in done)
    found = [cell for cell in done if counts[cell.regime] >= 2]
    report(f"finished_only: {len(found)} of {len(cells)} cells; no job is run")
    if not found:
        raise ConfigError("finished_only: no regime has two finished seeds yet: run the study without it")
    return found


def preview_checks(cells: Sequence[Cell], figures: Mapping[str, Sequence[CellFigures]]) -> list[PreviewCheck]:
    """Every verdict of the job preview against what training then did."""
    found = [one for regime in figures.values() for one in regime]
    return [
        check
        for cell, one in zip(cells, found, strict=True)
        for check in check_previews(cell.regime, cell.seed, one, cell.policies, verdicts_of(cell))
    ]


def boundary_places(config: SweepConfig, figures: Mapping[str, Sequence[CellFigures]]) -> dict[str, Place]:
    """The places of the regimes whose demonstrations and start have a known quality; a random start has none."""
    return {
        regime: at for regime, cells in figures.items() if (at := place(cells, config.primary_of(regime))) is not None
    }


def run_cells(cells: Sequence[Cell], config: SweepConfig, title: str, report: Report) -> list[CellFigures]:
    """The figures of all cells, in order; runs those that are not finished."""
    missing = [cell for cell in cells if not cell.figures.is_file()]
    if missing and config.finished_only:
        raise ConfigError(f"finished_only: {len(missing)} cells of {title} are not finished: run the study without it")
    if missing:
        report(f"{len(missing)} of {len(cells)} cells to run; each has its own log, such as {missing[0].log}")
    done: Iterable[object] = ()
    if missing and config.submitit is not None:
        done = on_a_cluster(missing, config.submitit, config.output_dir / "submitit")
    elif missing:
        done = in_processes(config.processes, logged_cell, missing)
    with Progress(len(cells), f"cells ({title})", len(cells) - len(missing)) as progress:
        for _ in done:
            progress.advance()
    return [cell_figures(cell, report) for cell in cells]


def logged_cell(cell: Cell) -> CellFigures:
    """`cell_figures` in a worker process; output of this process and its jobs goes to the cell's log from now on."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as file:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(file.fileno(), output.fileno())
    try:
        return cell_figures(cell, partial(print, flush=True))
    except JobError as error:
        raise JobError(f"{error}; more in {cell.log}") from error


def on_a_cluster(cells: Sequence[Cell], options: Mapping[str, object], folder: Path) -> Iterable[None]:
    """Runs the cells, each as a job that submitit submits; yields after each.

    Raises ConfigError if submitit is missing or refuses the options, JobError if a job fails or leaves no figures here.
    """
    try:
        submitit = importlib.import_module("submitit")
    except ImportError:
        raise ConfigError("submitit is set, but not installed: pip install submitit") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.get("cluster"))
        executor.update_parameters(**{name: value for name, value in options.items() if name != "cluster"})
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"submitit refuses these options: {' '.join(str(error).split())}") from None
    for cell, job in zip(cells, executor.map_array(logged_cell, cells), strict=True):
        failure = job.exception()
        if failure is not None:
            last_line = (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
            raise JobError(f"{cell.regime}, seed {cell.seed}: {last_line}; more in {cell.log} and {folder}")
        if not cell.figures.is_file():
            raise JobError(
                f"the job of {cell.regime}, seed {cell.seed} ended, but {cell.figures} is not here: put output_dir on "
                "a file system that the cluster shares with this machine"
            )
        yield


def commits_of(cells: Sequence[Cell], report: Report) -> dict[str, int]:
    """Commit of this program -> number of jobs that were last started at it; reports if there are several."""
    records = [json.loads(path.read_text()) for cell in cells for path in sorted(cell.folder.glob("*/run.json"))]
    counts = Counter(str(record["commit"]) for record in records)
    if len(counts) > 1:
        listed = ", ".join(f"{number} at {name}" for name, number in counts.most_common())
        report(f"the jobs ran at several commits, so they may not be comparable: {listed}")
    return dict(counts)


def sweep_record(
    config: SweepConfig,
    choices: Mapping[str, Mapping[str, Choice]],
    figures: Mapping[str, Sequence[CellFigures]],
    results: Mapping[str, PrimaryResult],
    places: Mapping[str, Place],
) -> dict[str, object]:
    """Everything that was found, as JSON."""
    return {
        "config": config.model_dump(mode="json"),
        "tuning": {regime: {name: asdict(one) for name, one in chosen.items()} for regime, chosen in choices.items()},
        "cells": {regime: [asdict(cell) for cell in cells] for regime, cells in figures.items()},
        "summary": {regime: summarise(cells) for regime, cells in figures.items()},
        "primary": {regime: asdict(one) for regime, one in results.items()},
        "boundary": {regime: asdict(one) for regime, one in places.items()},
        "rewards": {regime: summarise_rewards(cells) for regime, cells in figures.items()},
    }


def plot(
    config: SweepConfig, figures: Mapping[str, Sequence[CellFigures]], places: Mapping[str, Place], folder: Path
) -> None:
    """The pictures: all policies, the boundary if it has several places, each series in the regimes that have it."""
    plot_policies(figures, folder / "sweep")
    if len(places) > 1:
        primaries = sorted({config.primary_of(regime) for regime in places})
        plot_boundary(places, folder / "boundary", " or ".join(primaries))
    for name, series in config.series.items():
        names = [series_name(name, value) for value in series.values]
        positions = series.positions or [float(str(value)) for value in series.values]
        here = {regime: cells for regime, cells in figures.items() if set(names) <= cells[0].policies.keys()}
        if here:
            plot_series(here, names, positions, series.label, folder / name)
