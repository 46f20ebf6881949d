"""Compares options of DPR on a task whose optimum is known: `dense-reward-train estimators CONFIG`.

Every run is the learner of the DPR job; its rewards come from a table instead of a service. Each estimator's learning
rate is chosen on a separate task, by the gap closed at the end; the reported tasks have different seeds. Every finished
run is written, so that a stopped study can be resumed.
"""

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.studies.compare_options_config import Curve, EstimatorsConfig, TaskOptions, curve_path
from dense_reward_trainer.studies.compare_options_plot import plot_study
from dense_reward_trainer.studies.exact_task import TableRewards, Task, make_task

RunKey = tuple[str, float, int]  # estimator, learning rate, seed


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an estimator, in the order of the seeds.

    `tokens_to_half`: scored tokens until half of the gap was closed, null if half was not reached.
    """

    learning_rate: float
    gap_closed: tuple[float, ...]
    tokens_to_half: tuple[float | None, ...]

    @property
    def mean_gap(self) -> float:
        return float(np.mean(self.gap_closed))

    @property
    def median_tokens_to_half(self) -> float | None:
        """None if any seed did not reach half of the gap."""
        reached = [tokens for tokens in self.tokens_to_half if tokens is not None]
        return float(np.median(reached)) if len(reached) == len(self.tokens_to_half) else None


def run(config: EstimatorsConfig, report: Report) -> dict[str, Outcome]:
    """Leave `estimators.json`, `estimators.png` and all curves in `config.output_dir`, and report a table.

    Raises ConfigError if the SFT model of a task leaves no gap, JobError if a run diverges.
    """
    check_run("estimators", config)
    folder = open_run("estimators", config).folder
    tuning = [(name, rate, config.tuning_seed) for name in config.estimators for rate in config.learning_rates]
    tuned = compute_curves(config, tuning, "learning rates")
    rates = {name: best_rate([curve for curve in tuned if curve.estimator == name]) for name in config.estimators}
    wanted = [(name, rates[name], seed) for name in config.estimators for seed in config.seeds]
    reported = compute_curves(config, wanted, "estimators")
    curves = {name: [curve for curve in reported if curve.estimator == name] for name in config.estimators}
    outcomes = {name: outcome(some) for name, some in curves.items()}
    cpu_hours = sum(curve.cpu_s for curve in [*tuned, *reported]) / 3600
    record = {
        "config": config.model_dump(mode="json"),
        "outcomes": {name: asdict(one) for name, one in outcomes.items()},
        "tuning": {name: by_rate(one for one in tuned if one.estimator == name) for name in config.estimators},
        "cpu_hours": cpu_hours,
    }
    write_whole(folder / "estimators.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_study(curves, folder / "estimators.png")
    report(format_table(outcomes))
    report(f"{cpu_hours:.2f} CPU-hours; figures, curves and plot: {folder}")
    return outcomes


def compute_curves(config: EstimatorsConfig, wanted: Sequence[RunKey], title: str) -> list[Curve]:
    """The wanted curves, in order; computes and writes those that have no file yet."""
    missing = [one for one in wanted if not curve_path(config.output_dir, *one).is_file()]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=title, unit="run") as bar:
        for curve in in_processes(config.processes, curve_in_process, [(config, *one) for one in missing]):
            path = curve.path_in(config.output_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, curve.model_dump_json().encode())
            bar.set_postfix_str(f"{curve.estimator} {curve.gap_closed[-1]:.2f}")
            bar.update()
    return [Curve.model_validate_json(curve_path(config.output_dir, *one).read_bytes()) for one in wanted]


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
    steps, tokens, gaps, scored_tokens = [0], [0], [0.0], 0.0
    for step in range(1, config.steps + 1):
        scored_tokens += learner.step(step, task.prompts, rewards)["scored_tokens"]
        if step <= config.evaluate_first or step % config.evaluate_every == 0 or step == config.steps:
            reached = task.objective(task.logprobs(learner.result), config.kl_coefficient)
            steps.append(step)
            tokens.append(round(scored_tokens))
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
    """The learning rate that closed the largest part of the gap at the end."""
    return max(curves, key=lambda curve: curve.gap_closed[-1]).learning_rate


def by_rate(curves: Iterable[Curve]) -> dict[str, dict[str, float | None]]:
    """Gap closed by each learning rate on the tuning seed, and the tokens to half of it."""
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
    """Scored tokens until this share of the gap was first closed, by linear interpolation between evaluations."""
    for index in range(1, len(curve.gap_closed)):
        before, after = curve.gap_closed[index - 1 : index + 1]
        if after >= share:
            tokens_before, tokens_after = curve.scored_tokens[index - 1 : index + 1]
            return tokens_before + (tokens_after - tokens_before) * (share - before) / (after - before)
    return None


def format_table(outcomes: dict[str, Outcome]) -> str:
    """One line for each estimator, the best first."""
    ordered = sorted(outcomes.items(), key=lambda pair: -pair[1].mean_gap)
    rows = [["estimator", "learning rate", "gap closed", "worst seed", "scored tokens to half"]]
    for name, one in ordered:
        half = one.median_tokens_to_half
        rows.append(
            [
                name,
                f"{one.learning_rate:g}",
                f"{one.mean_gap:.3f}",
                f"{min(one.gap_closed):.3f}",
                "-" if half is None else f"{half:,.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
