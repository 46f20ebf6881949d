"""Compares options of DPR on a task whose optimum is known: `dense-reward-train estimators CONFIG`.

Every run is the learner of the DPR job; its rewards come from a table instead of a service. Each estimator's learning
rate is chosen on a separate task, by the gap closed at the end; the reported tasks have different seeds. Every finished
run is written, so that a stopped study can be resumed, also with more estimators or seeds.
"""

import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report

from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.runs.next_step import finished, report_page
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.studies.options.config import (
    Curve,
    EstimatorsConfig,
    TaskOptions,
    curve_path,
    read_curve,
)
from dense_reward_trainer.studies.options.exact_task import TableRewards, Task, make_task
from dense_reward_trainer.studies.options.plot import plot_study
from dense_reward_trainer.studies.options.table import (
    Outcome,
    differences_to,
    format_table,
    outcome,
    tokens_to,
)

RunKey = tuple[str, float, int]  # estimator, learning rate, seed


def run(config: EstimatorsConfig, report: Report) -> dict[str, Outcome]:
    """Leave `estimators.json`, `estimators.png` and all curves in `config.output_dir`, and report a table.

    Raises ConfigError if the SFT model of a task leaves no gap, JobError if a run diverges at a chosen learning rate.
    """
    check_run("estimators", config)
    folder = open_run("estimators", config).folder
    tuned = tune(config)
    rates = {name: best_rate(curves) for name, curves in tuned.items()}
    wanted = [(name, rates[name], seed) for name in config.estimators for seed in config.seeds_of(name)]
    reported = compute_curves(config, wanted, "estimators")
    refuse_diverged(reported)
    curves = {name: [curve for curve in reported if curve.estimator == name] for name in config.estimators}
    outcomes = {name: outcome(some, [one.learning_rate for one in tuned[name]]) for name, some in curves.items()}
    differences = differences_to(config.control, outcomes, config.families())
    cpu_hours = sum(curve.cpu_s for some in (*tuned.values(), reported) for curve in some) / 3600
    record = {
        "config": config.model_dump(mode="json"),
        "outcomes": {name: asdict(one) for name, one in outcomes.items()},
        "differences": {name: asdict(one) for name, one in differences.items()},
        "tuning": {name: by_rate(some) for name, some in tuned.items()},
        "cpu_hours": cpu_hours,
    }
    write_whole(folder / "estimators.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_study(curves, folder / "estimators.png")
    report(format_table(outcomes, differences))
    report(f"{cpu_hours:.2f} CPU-hours")
    report(finished(folder / "estimators.json", report_page(folder)))
    return outcomes


def tune(config: EstimatorsConfig) -> dict[str, list[Curve]]:
    """Every estimator's runs on the tuning task: `learning_rates`, and wider ones while the best is on the edge."""
    tried = {name: list(config.learning_rates) for name in config.estimators}
    while True:
        wanted = [(name, rate, config.tuning_seed) for name, rates in tried.items() for rate in rates]
        found = compute_curves(config, wanted, "learning rates")
        curves = {name: [curve for curve in found if curve.estimator == name] for name in tried}
        wider = {name: config.next_rate(tried[name], best_rate(some)) for name, some in curves.items()}
        if not any(wider.values()):
            return curves
        for name, rate in wider.items():
            if rate is not None:
                tried[name] = sorted([*tried[name], rate])


def compute_curves(config: EstimatorsConfig, wanted: Sequence[RunKey], title: str) -> list[Curve]:
    """The wanted curves, in order; computes and writes those that have no file yet."""
    missing = [one for one in wanted if not curve_path(config.output_dir, *one).is_file()]
    for one in wanted:  # a run with other options is refused before anything is computed
        if one not in missing:
            read_curve(config, *one)
    with Progress(len(wanted), f"runs ({title})", len(wanted) - len(missing)) as progress:
        for curve in in_processes(config.processes, curve_in_process, [(config, *one) for one in missing]):
            path = curve.path_in(config.output_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, curve.model_dump_json().encode())
            progress.advance(note=f"{curve.estimator} {curve.gap_closed[-1]:.2f}")
    return [read_curve(config, *one) for one in wanted]


def curve_in_process(arguments: tuple[EstimatorsConfig, str, float, int]) -> Curve:
    """`learning_curve` in a worker process, with one thread: sums do not depend on the number of cores."""
    torch.set_num_threads(1)
    return learning_curve(*arguments)


@lru_cache(maxsize=8)
def task_of(options: TaskOptions, seed: int) -> Task:
    return make_task(options, seed)


def learning_curve(config: EstimatorsConfig, estimator: str, learning_rate: float, seed: int) -> Curve:
    """One run of one estimator. Raises ConfigError if the task leaves no gap to close."""
    started_s = time.process_time()
    task, dpr = task_of(config.task, seed), config.dpr(estimator, learning_rate, seed)
    at_sft, best = task.objective(task.sft_PSV, config.kl_coefficient), task.optimum(config.kl_coefficient)
    if best - at_sft < 1e-3:
        raise ConfigError(
            f"the task of seed {seed} leaves a gap of {best - at_sft:.2g} nats between the SFT model and the optimum: "
            "lower task.reference or task.demonstrations"
        )
    learner = Learner.of(dpr, replace(task.sft, model=copy.deepcopy(task.sft.model)))
    rewards = TableRewards(task, dpr.signal)
    steps, tokens, gaps, scored_tokens, diverged = [0], [0], [0.0], 0.0, False
    for step in range(1, config.steps + 1):
        scored = scored_in_step(learner, step, task, rewards)
        if scored is None:
            diverged = True
            break
        scored_tokens += scored
        if step <= config.evaluate_first or step % config.evaluate_every == 0 or step == config.steps:
            reached = task.objective(task.logprobs(learner.result), config.kl_coefficient)
            if not math.isfinite(reached):
                diverged = True
                break
            steps.append(step)
            tokens.append(round(scored_tokens))
            gaps.append((reached - at_sft) / (best - at_sft))
    return Curve(
        estimator=estimator,
        options=config.estimators[estimator],
        learning_rate=learning_rate,
        seed=seed,
        steps=tuple(steps),
        scored_tokens=tuple(tokens),
        gap_closed=tuple(gaps),
        diverged=diverged,
        sft_objective=at_sft,
        optimal_objective=best,
        cpu_s=time.process_time() - started_s,
    )


def scored_in_step(learner: Learner, step: int, task: Task, rewards: TableRewards) -> float | None:
    """Takes a step; returns the tokens that it scored, or None if the policy or its gradient is not finite any more."""
    try:
        return learner.step(step, task.prompts, rewards)["scored_tokens"]
    except JobError:  # a gradient is not finite
        return None
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial (torch 2.13), for probabilities that are nan
            raise
        return None


def best_rate(curves: Sequence[Curve]) -> float:
    """The learning rate that closed the largest part of the gap at the end. Raises JobError if all runs diverged."""
    finished = [curve for curve in curves if not curve.diverged]
    if not finished:
        raise JobError(f"{curves[0].estimator} diverges at every learning rate: add lower ones to learning_rates")
    return max(finished, key=lambda curve: curve.gap_closed[-1]).learning_rate


def refuse_diverged(curves: Iterable[Curve]) -> None:
    """Raises JobError if a reported run diverged: its estimator has no mean."""
    for curve in curves:
        if curve.diverged:
            raise JobError(
                f"{curve.estimator} diverges at its learning rate {curve.learning_rate:g} with seed {curve.seed}: "
                "remove that rate from learning_rates and use another output_dir"
            )


def by_rate(curves: Iterable[Curve]) -> dict[str, dict[str, float | None]]:
    """Gap closed by each learning rate on the tuning seed, and the tokens to half of it; null where a run diverged."""
    return {
        f"{curve.learning_rate:g}": {
            "gap_closed": None if curve.diverged else curve.gap_closed[-1],
            "tokens_to_half": tokens_to(0.5, curve),
        }
        for curve in curves
    }
