"""The jobs of a cell of the regimes study, each in its own process. Read from `cell_figures` downwards.

The jobs are those that a user runs; they read only files and a service of the cell's checkpoints.
"""

import importlib
import json
import multiprocessing
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.manifest import load_manifest
from dense_reward.records import Report

from dense_reward_trainer.cli import JOBS, main
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.data.final_answers import final_answer
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.checkpoint import is_complete
from dense_reward_trainer.runs.local_service import free_port, serving_run
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, METRICS_NAME, MetricsLog
from dense_reward_trainer.studies.regimes_cell import (
    START,
    Cell,
    arguments,
    dpr_overrides,
    evaluated_policies,
    points_of,
    sft_overrides,
)
from dense_reward_trainer.studies.regimes_config import DprPolicy, MatchedKlPolicy, Overrides, SftPolicy
from dense_reward_trainer.studies.regimes_figures import CellFigures, Figures, Verdict, at_matched_kl
from dense_reward_trainer.tasks.records import share_right
from dense_reward_trainer.tasks.write import write_task

# FLOPs per weight and token (Kaplan et al., arXiv 2001.08361, section 2.1); attention is left out on both sides.
FORWARD, TRAINING = 2, 6
SAMPLING = SCORING_OF_EACH_MODEL = LOGPROBS = FORWARD


def cell_figures(cell: Cell, report: Report) -> CellFigures:
    """The figures of every policy; runs the jobs that are not finished. Raises JobError if one fails."""
    if cell.figures.is_file():
        return CellFigures.of(json.loads(cell.figures.read_text()))
    report(f"{cell.regime}, seed {cell.seed}")
    with cpu_time_recorded(cell):
        data = write_task(cell.settings.task, cell.seed, cell.files.folder, labelled=cell.config.labelled)
        train_sft(cell, with_base=bool(data.base))
        verdict = previewed(cell)
        with serving_run(cell.folder / "sft", free_port(), cell.config.threads) as (_, url):
            for name, policy in cell.policies.items():
                if isinstance(policy, DprPolicy) and not is_complete(cell.checkpoint(name)):
                    train_dpr(cell, name, policy, url)
            for name, policy in cell.policies.items():
                if isinstance(policy, SftPolicy):
                    continue_sft(cell, name, policy)
            evaluation = evaluate(cell, url)
    policies = {name: policy_figures(cell, name, evaluation) for name in ("sft", *cell.policies)}
    for name, policy in cell.policies.items():
        if isinstance(policy, MatchedKlPolicy):
            curve = [Figures.of(evaluation[point]) for point in points_of(name, policy)]
            policies[name] = at_matched_kl(curve, policies[policy.to].kl_to_sft)
    start = Figures.of(evaluation[START]) if data.base and START in evaluation else None
    figures = CellFigures(policies, share_right(data.train, final_answer), start, verdict)
    write_whole(cell.figures, json.dumps(asdict(figures), indent=2).encode() + b"\n")
    return figures


def policy_figures(cell: Cell, name: str, evaluation: Mapping[str, Mapping[str, object]]) -> Figures:
    """The figures of one policy; of a policy at a matched KL, those of its first point."""
    policy = cell.policies.get(name)
    return Figures.of(evaluation[points_of(name, policy)[0] if isinstance(policy, MatchedKlPolicy) else name])


def train_sft(cell: Cell, *, with_base: bool) -> None:
    """Train the base model if the task has data for one, then the SFT model and its milestones."""
    data: Overrides = {"data": {"source": str(cell.files.train), "held_out_fraction": 0.0}, "eval_every_steps": None}
    overrides = data | sft_overrides(cell)
    if with_base:
        base: Overrides = {
            "data": {"source": str(cell.files.base), "held_out_fraction": 0.0},
            "eval_every_steps": None,
            "milestones": {},
        }
        run_job(cell, "base_model", "sft", cell.config.sft_recipe, base | cell.config.base | cell.settings.base)
        overrides = started_from(cell.folder / "base_model" / "checkpoints" / "sft", overrides)
    run_job(cell, "sft", "sft", cell.config.sft_recipe, overrides)


def previewed(cell: Cell) -> Verdict | None:
    """The verdict of the job preview, before any policy is trained; None if the study has no preview."""
    if cell.config.preview is None or cell.is_tuning:
        return None
    overrides: Overrides = {"run": str(cell.folder / "sft"), "labelled": str(cell.files.labelled)}
    run_job(cell, "preview", "preview", "arithmetic_preview", overrides | cell.config.preview | cell.settings.preview)
    found = json.loads((cell.folder / "preview" / "preview.json").read_text())
    return Verdict(found["verdict"], found["reference"], found["reason"])


def train_dpr(cell: Cell, name: str, policy: DprPolicy, url: str) -> None:
    """Train one DPR policy on the service's pair of its reference."""
    overrides: Overrides = {
        "prompts": {"source": str(cell.files.prompts), "held_out_fraction": 0.0},
        "policy": str(cell.checkpoint("sft")),
        "held_out": None,
        "service_url": url,
        "service_pair": policy.reference,
    }
    run_job(cell, name, "dpr", policy.recipe, overrides | dpr_overrides(cell, policy))


def continue_sft(cell: Cell, name: str, policy: SftPolicy) -> None:
    """Continue SFT from the SFT model on the same demonstrations."""
    data: Overrides = {"data": {"source": str(cell.files.train), "held_out_fraction": 0.0}, "eval_every_steps": None}
    overrides = started_from(cell.checkpoint("sft"), data | sft_overrides(cell))
    own: Overrides = {"milestones": {}}
    if policy.matched_flops is not None:
        own |= {"epochs": 10_000, "max_steps": matched_steps(cell, policy.matched_flops), "warmup_steps": 0}
    run_job(cell, name, "sft", cell.config.sft_recipe, overrides | own | policy.sft)


def started_from(checkpoint: Path, overrides: Overrides) -> Overrides:
    """The overrides of an SFT run that starts from a checkpoint, and keeps the renderer that it was trained with.

    What the overrides say about another start is left out.
    """
    kept = {key: value for key, value in overrides.items() if key.partition(".")[0] != "scratch"}
    start: Overrides = {"base_model": str(checkpoint), "scratch": None, "renderer": load_manifest(checkpoint).renderer}
    return kept | start


def matched_steps(cell: Cell, dpr: str) -> int:
    """The steps of SFT that cost as many FLOPs as a DPR policy of the cell."""
    sft_lines = MetricsLog(cell.folder / "sft" / METRICS_NAME).read()
    dpr_lines = MetricsLog(cell.folder / dpr / METRICS_NAME).read()
    matched = load_config(DprConfig, cell.folder / dpr / CONFIG_NAME)
    dpr_tokens = sum(line.get("computed_tokens") or 0.0 for line in dpr_lines)
    return matched_sft_steps(dpr_tokens, matched.updates_per_batch, tokens_per_step(sft_lines))


def dpr_flops_per_token(updates_per_batch: int) -> int:
    """FLOPs per weight and token: sample it, compute its log-prob, score it with two models, train on it."""
    return SAMPLING + LOGPROBS + 2 * SCORING_OF_EACH_MODEL + TRAINING * updates_per_batch


def matched_sft_steps(dpr_tokens: float, updates_per_batch: int, sft_tokens_per_step: float) -> int:
    """Steps of SFT with the FLOPs of a DPR run over `dpr_tokens`, prompts included; at least 1."""
    return max(1, round(dpr_tokens * dpr_flops_per_token(updates_per_batch) / (TRAINING * sft_tokens_per_step)))


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
    """Evaluate every policy and the start of the SFT run on the test problems. Keys: names of policies and points."""
    overrides: Overrides = {
        "policies": evaluated_policies(cell),
        "held_out": str(cell.files.test),
        "service_url": url,
    }
    run_job(
        cell,
        "evaluation",
        "evaluate",
        "arithmetic_evaluate",
        overrides | cell.config.evaluate | cell.settings.evaluate,
        seeded=False,
    )
    evaluation: dict[str, dict[str, object]] = json.loads((cell.folder / "evaluation" / "evaluation.json").read_text())
    return evaluation


def run_job(cell: Cell, name: str, kind: str, recipe: str, overrides: Overrides, *, seeded: bool = True) -> None:
    """Run one job in its own process, in the folder `name` of the cell. Raises JobError if it fails.

    The process is a fork of this one, which has imported the job's libraries but computed nothing with them: imports
    would take as long as a small job.
    """
    folder = cell.folder / name
    always: Overrides = {"output_dir": str(folder), "threads": cell.config.threads, "device": "cpu"}
    always |= {"seed": cell.seed} if seeded else {}
    importlib.import_module(JOBS[kind].module)
    command = [kind, recipe, *arguments(always | overrides)]
    process = multiprocessing.get_context("fork").Process(target=_exit_with, args=(command,))
    process.start()
    process.join()
    if process.exitcode:
        raise JobError(f"{kind} of {folder} {_how_it_ended(process.exitcode)}")


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by signal {-code}: if you did not do that, memory ran out; start again with fewer processes"
    return f"failed with exit code {code}: the error is above"


def _exit_with(command: Sequence[str]) -> None:
    raise SystemExit(main(command))


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


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
