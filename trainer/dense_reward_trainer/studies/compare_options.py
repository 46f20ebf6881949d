"""Options of DPR compared on a task whose optimum is known: `dense-reward-train estimators CONFIG`.

Every run is the DPR job's own learner on rewards that are looked up instead of served. Each estimator's learning rate
is chosen on a task of its own, by the gap that is closed at the end; the tasks that count have other seeds. Runs are
kept as they end, so that a study that was stopped goes on where it was.
"""

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from dense_reward.checkpoints.write_manifest import write_whole
from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.studies.compare_options_config import Curve, EstimatorsConfig, TaskOptions, curve_path
from dense_reward_trainer.studies.compare_options_plot import plot_study
from dense_reward_trainer.studies.exact_task import TableRewards, Task, make_task

Chosen = tuple[str, float, int]  # estimator, learning rate, seed


@dataclass(frozen=True, slots=True)
class Outcome:
    """An estimator over the seeds that count. `tokens_to_half`: scored tokens until half of the gap was closed.

    Both in the order of the seeds; null where half was not reached.
    """

    learning_rate: float
    gap_closed: tuple[float, ...]
    tokens_to_half: tuple[float | None, ...]

    @property
    def mean_gap(self) -> float:
        return float(np.mean(self.gap_closed))

    @property
    def median_tokens_to_half(self) -> float | None:
        """None where any seed did not reach half of the gap."""
        reached = [tokens for tokens in self.tokens_to_half if tokens is not None]
        return float(np.median(reached)) if len(reached) == len(self.tokens_to_half) else None


def run(config: EstimatorsConfig, report: Report) -> dict[str, Outcome]:
    """Leave `estimators.json`, `estimators.png` and all curves in `config.output_dir`, and report a table.

    Raises ConfigError where the SFT model of a task leaves no gap, JobError where a run diverges.
    """
    check_run("estimators", config)
    folder = open_run("estimators", config).folder
    tuning = [(name, rate, config.tuning_seed) for name in config.estimators for rate in config.learning_rates]
    tried = compute(config, tuning, "learning rates")
    rates = {name: best_rate([curve for curve in tried if curve.estimator == name]) for name in config.estimators}
    counted = compute(config, [(n, rates[n], seed) for n in config.estimators for seed in config.seeds], "estimators")
    curves = {name: [curve for curve in counted if curve.estimator == name] for name in config.estimators}
    outcomes = {name: outcome(found) for name, found in curves.items()}
    cpu_hours = sum(curve.cpu_s for curve in [*tried, *counted]) / 3600
    record = {
        "config": config.model_dump(mode="json"),
        "outcomes": {name: asdict(found) for name, found in outcomes.items()},
        "tuning": {name: by_rate(one for one in tried if one.estimator == name) for name in config.estimators},
        "cpu_hours": cpu_hours,
    }
    write_whole(folder / "estimators.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_study(curves, folder / "estimators.png")
    report(table(outcomes))
    report(f"{cpu_hours:.2f} CPU-hours; figures, curves and plot: {folder}")
    return outcomes


def compute(config: EstimatorsConfig, wanted: Sequence[Chosen], title: str) -> list[Curve]:
    """The curves that are wanted, in order; those that are not kept yet are computed and kept."""
    missing = [one for one in wanted if not curve_path(config.output_dir, *one).is_file()]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=title, unit="run") as bar:
        for curve in in_processes(config.processes, curve_apart, [(config, *one) for one in missing]):
            path = curve.path_in(config.output_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, curve.model_dump_json().encode())
            bar.set_postfix_str(f"{curve.estimator} {curve.gap_closed[-1]:.2f}")
            bar.update()
    return [Curve.model_validate_json(curve_path(config.output_dir, *one).read_bytes()) for one in wanted]


def curve_apart(chosen: tuple[EstimatorsConfig, str, float, int]) -> Curve:
    """In a process of its own, with one thread, so that a curve does not depend on how many there are."""
    torch.set_num_threads(1)
    return curve_of(*chosen)


@lru_cache(maxsize=8)
def task_of(options: TaskOptions, seed: int) -> Task:
    return make_task(options, seed)


def curve_of(config: EstimatorsConfig, estimator: str, learning_rate: float, seed: int) -> Curve:
    """One run. Raises ConfigError where there is no gap to close."""
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
    steps, tokens, gaps, spent = [0], [0], [0.0], 0.0
    for step in range(1, config.steps + 1):
        spent += learner.step(step, task.prompts, rewards)["scored_tokens"]
        if step <= config.evaluate_first or step % config.evaluate_every == 0 or step == config.steps:
            reached = task.objective(task.logprobs(learner.result), config.kl_coefficient)
            steps.append(step)
            tokens.append(round(spent))
            gaps.append((reached - at_sft) / (best - at_sft))
    return Curve(
        estimator=estimator,
        learning_rate=learning_rate,
        seed=seed,
        steps=tuple(steps),
        scored_tokens=tuple(tokens),
        gap_closed=tuple(gaps),
        sft_objective=at_sft,
        optimal_objective=best,
        cpu_s=time.process_time() - started_s,
    )


def best_rate(curves: Sequence[Curve]) -> float:
    """The learning rate that closed most of the gap in the end."""
    return max(curves, key=lambda curve: curve.gap_closed[-1]).learning_rate


def by_rate(curves: Iterable[Curve]) -> dict[str, dict[str, float | None]]:
    """By learning rate, on the tuning seed."""
    return {
        f"{curve.learning_rate:g}": {"gap_closed": curve.gap_closed[-1], "tokens_to_half": tokens_to(0.5, curve)}
        for curve in curves
    }


def outcome(curves: Sequence[Curve]) -> Outcome:
    return Outcome(
        curves[0].learning_rate,
        tuple(curve.gap_closed[-1] for curve in curves),
        tuple(tokens_to(0.5, curve) for curve in curves),
    )


def tokens_to(share: float, curve: Curve) -> float | None:
    """Scored tokens until this share of the gap was closed first, between evaluations by a straight line."""
    for index in range(1, len(curve.gap_closed)):
        before, after = curve.gap_closed[index - 1 : index + 1]
        if after >= share:
            tokens_before, tokens_after = curve.scored_tokens[index - 1 : index + 1]
            return tokens_before + (tokens_after - tokens_before) * (share - before) / (after - before)
    return None


def table(outcomes: dict[str, Outcome]) -> str:
    """One line for each estimator, the best first."""
    ordered = sorted(outcomes.items(), key=lambda pair: -pair[1].mean_gap)
    rows = [["estimator", "learning rate", "gap closed", "worst seed", "scored tokens to half"]]
    for name, found in ordered:
        half = found.median_tokens_to_half
        rows.append(
            [
                name,
                f"{found.learning_rate:g}",
                f"{found.mean_gap:.3f}",
                f"{min(found.gap_closed):.3f}",
                "-" if half is None else f"{half:,.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
