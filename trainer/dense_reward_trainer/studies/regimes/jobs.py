"""The jobs of a cell of the regimes study, each in its own process. Read from `cell_figures` downwards.

The jobs are those that a user runs; they read only files and a service of the cell's checkpoints.
"""

import importlib
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import yaml
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.manifest import load_manifest
from dense_reward.records import Report

from dense_reward_trainer.cli import main
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.configs.base import JobConfig, changed_keys, load_config
from dense_reward_trainer.configs.evaluate import EvaluateConfig
from dense_reward_trainer.data.final_answers import answer_of
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.launch import Cluster, launch_command
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.checkpoint import is_complete
from dense_reward_trainer.runs.local_service import free_port, serving_head, serving_run
from dense_reward_trainer.runs.processes import end_with_parent, started
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, redacted
from dense_reward_trainer.studies.regimes.cell import (
    START,
    Cell,
    Job,
    arguments,
    dpr_overrides,
    evaluated_policies,
    job_folder,
    points_of,
    seeded_job,
    sft_overrides,
)
from dense_reward_trainer.studies.regimes.figures import CellFigures, Figures, at_matched_kl
from dense_reward_trainer.studies.regimes.flops import matched_steps
from dense_reward_trainer.studies.regimes.policies import (
    DprPolicy,
    MatchedKlPolicy,
    Overrides,
    RftPolicy,
    SelfPlayPolicy,
    SftPolicy,
)
from dense_reward_trainer.studies.regimes.preview import Verdict
from dense_reward_trainer.studies.regimes.rewards import SFT, credit_file, credit_job, reward_figures, sources
from dense_reward_trainer.tasks.records import TaskData, share_right
from dense_reward_trainer.tasks.write import write_task

LAUNCHED = frozenset({"sft", "dpr"})
"""Jobs that run in several processes."""
LONGEST_ERROR = 10_000
"""Characters of a job's error that are sent: a pipe holds them, so that the job does not wait for a reader."""


def cell_figures(cell: Cell, report: Report) -> CellFigures:
    """The figures of every policy; runs the jobs that are not finished. Raises JobError if one fails.

    Raises ConfigError if the cell was finished with other values.
    """
    if cell.figures.is_file():
        check_finished(cell)
        return CellFigures.of(json.loads(cell.figures.read_text()))
    report(f"{cell.regime}, seed {cell.seed}")
    with cpu_time_recorded(cell):
        data = write_task(cell.settings.task, cell.seed, cell.files.folder, labelled=cell.config.labelled)
        for job in sft_jobs(cell, with_base=bool(data.base)):
            run_job(cell, job)
        for job in preview_jobs(cell):
            run_job(cell, job)
        with serving_run(cell.folder / "sft", free_port(), cell.config.threads) as (_, url):
            for name, policy in cell.policies.items():
                if isinstance(policy, DprPolicy):
                    train_dpr(cell, dpr_job(cell, name, policy, url))
            for name, policy in cell.policies.items():
                if isinstance(policy, SftPolicy):
                    run_job(cell, continued_job(cell, name, policy))
                if isinstance(policy, SelfPlayPolicy | RftPolicy):
                    run_job(cell, own_answers_job(cell, name, policy))
            measure_rewards(cell, url)
            tested = evaluation_job(cell, url)
            run_job(cell, tested)
    evaluation = json.loads((cell.folder / "evaluation" / "evaluation.json").read_text())
    policies = {name: policy_figures(cell, name, evaluation) for name in ("sft", *cell.policies)}
    for name, policy in cell.policies.items():
        if isinstance(policy, MatchedKlPolicy):
            curve = [Figures.of(evaluation[point]) for point in points_of(name, policy)]
            policies[name] = at_matched_kl(curve, policies[policy.to].kl_to_sft)
    start = Figures.of(evaluation[START]) if data.base and START in evaluation else None
    rewards = {source: reward_figures(cell, source) for source in sources(cell)}
    figures = CellFigures(policies, demonstrations_right(data, tested), start, rewards)
    write_whole(cell.figures, json.dumps(asdict(figures), indent=2).encode() + b"\n")
    return figures


def demonstrations_right(data: TaskData, tested: Job) -> float | None:
    """The share of right demonstrations, by the checker of the evaluation; None if it is not known."""
    config = load_config(EvaluateConfig, config_path(tested.recipe), arguments(tested.overrides))
    checker = config.held_out_options.checker
    return None if checker == "exact" else share_right(data.train, lambda text: answer_of(text, checker))


def policy_figures(cell: Cell, name: str, evaluation: Mapping[str, Mapping[str, object]]) -> Figures:
    """The figures of one policy; of a policy at a matched KL, those of its first point."""
    policy = cell.policies.get(name)
    return Figures.of(evaluation[points_of(name, policy)[0] if isinstance(policy, MatchedKlPolicy) else name])


def sft_jobs(cell: Cell, *, with_base: bool) -> Iterator[Job]:
    """SFT of the base model if the task has data for one, then of the SFT model and its milestones."""
    recipe = cell.config.sft_recipe
    data: Overrides = {"data": {"source": str(cell.files.train), "held_out_fraction": 0.0}, "eval_every_steps": None}
    overrides = data | sft_overrides(cell)
    if with_base:
        base: Overrides = {
            "data": {"source": str(cell.files.base), "held_out_fraction": 0.0},
            "eval_every_steps": None,
            "milestones": {},
        }
        yield seeded_job(cell, "base_model", "sft", recipe, base | cell.config.base | cell.settings.base)
        overrides = started_from(base_checkpoint(cell), overrides)
    yield seeded_job(cell, "sft", "sft", recipe, overrides)


def base_checkpoint(cell: Cell) -> Path:
    return cell.folder / "base_model" / "checkpoints" / "sft"


def verdicts_of(cell: Cell) -> dict[str, Verdict]:
    """What the job preview said of each reference, before any policy was trained; nothing if there was no preview."""
    found: dict[str, Verdict] = {}
    for job in preview_jobs(cell):
        references = json.loads((cell.folder / job.name / "preview.json").read_text())["references"]
        found = {name: Verdict(one["verdict"], one["reason"]) for name, one in references.items()}
    return found


def preview_jobs(cell: Cell) -> Iterator[Job]:
    """The job preview, if the study has one; cells that only tune have none."""
    if cell.config.preview is not None and not cell.is_tuning:
        overrides: Overrides = {"run": str(cell.folder / "sft"), "labelled": str(cell.files.labelled)}
        overrides |= cell.config.preview | cell.settings.preview
        yield seeded_job(cell, "preview", "preview", "arithmetic_preview", overrides)


def dpr_job(cell: Cell, name: str, policy: DprPolicy, url: str) -> Job:
    """DPR of one policy on the service's pair of its reference."""
    overrides: Overrides = {
        "prompts": {"source": str(cell.files.prompts), "held_out_fraction": 0.0},
        "policy": str(cell.checkpoint("sft")),
        "held_out": None,
        "service_url": url,
        "service_pair": policy.reference,
    }
    return seeded_job(cell, name, "dpr", policy.recipe, overrides | dpr_overrides(cell, policy))


def train_dpr(cell: Cell, job: Job) -> None:
    """Run a job of DPR, unless its policy is finished with the same values. Raises ConfigError if they differ."""
    if not is_complete(cell.checkpoint(job.name)):
        run_job(cell, job)
    elif changed := changed_values(cell, job):
        raise ConfigError(_other_values(cell.folder / job.name, changed))


def continued_job(cell: Cell, name: str, policy: SftPolicy) -> Job:
    """SFT that continues from the SFT model on the same demonstrations."""
    data: Overrides = {"data": {"source": str(cell.files.train), "held_out_fraction": 0.0}, "eval_every_steps": None}
    overrides = started_from(cell.checkpoint("sft"), data | sft_overrides(cell))
    own: Overrides = {"milestones": {}}
    if policy.matched_flops is not None:
        own |= {"epochs": 10_000, "max_steps": matched_steps(cell, policy.matched_flops), "warmup_steps": 0}
    return seeded_job(cell, name, "sft", cell.config.sft_recipe, overrides | own | policy.sft)


def own_answers_job(cell: Cell, name: str, policy: SelfPlayPolicy | RftPolicy) -> Job:
    """Self-play or RFT from the SFT model, on the demonstrations of SFT."""
    data: Overrides = {"data": {"source": str(cell.files.train), "held_out_fraction": 0.0}}
    start: Overrides = {"policy": str(cell.checkpoint("sft"))}
    if isinstance(policy, RftPolicy):
        start["held_out"] = None
    return seeded_job(cell, name, policy.kind, policy.recipe, data | start | policy.options)


def measure_rewards(cell: Cell, url: str) -> None:
    """Run the job credit on every run that leaves a reward, unless it is done. `url`: the service of the SFT run.

    Raises ConfigError if it was done with other values.
    """
    for source in sources(cell):
        if credit_file(cell, source).is_file():
            job = credit_job(cell, source, url)
            if changed := changed_values(cell, job):
                raise ConfigError(_other_values(cell.folder / job.name, changed))
            continue
        if source == SFT:
            run_job(cell, credit_job(cell, source, url))
            continue
        with reward_service(cell, source) as (_, own):
            run_job(cell, credit_job(cell, source, own))


def reward_service(cell: Cell, source: str) -> AbstractContextManager[tuple[object, str]]:
    """The service of the reward that a policy's training left, and its URL."""
    policy = cell.policies[source]
    if isinstance(policy, RftPolicy):
        return serving_head(cell.token_head(source, policy), free_port(), cell.config.threads)
    return serving_run(cell.folder / source, free_port(), cell.config.threads)


def started_from(checkpoint: Path, overrides: Overrides) -> Overrides:
    """The overrides of an SFT run that starts from a checkpoint, and keeps the renderer that it was trained with.

    What the overrides say about another start is left out.
    """
    kept = {key: value for key, value in overrides.items() if key.partition(".")[0] != "scratch"}
    start: Overrides = {"base_model": str(checkpoint), "scratch": None, "renderer": load_manifest(checkpoint).renderer}
    return kept | start


def evaluation_job(cell: Cell, url: str) -> Job:
    """Evaluates every policy and the start of the SFT run on the test problems."""
    overrides: Overrides = {
        "policies": evaluated_policies(cell),
        "held_out": str(cell.files.test),
        "service_url": url,
    }
    overrides |= cell.config.evaluate | cell.settings.evaluate
    return Job("evaluation", "evaluate", "arithmetic_evaluate", job_folder(cell, "evaluation") | overrides)


def run_job(cell: Cell, job: Job) -> None:
    """Run one job in its own process, in its folder of the cell. Raises JobError with the job's error if it fails.

    The process is a fork of this one, which has imported the job's libraries but computed nothing with them: imports
    would take as long as a small job. Its error comes through a pipe, because a full disk cuts off the log.
    """
    importlib.import_module(JOBS[job.kind].module)
    command = [job.kind, job.recipe, *arguments(job.overrides)]
    launcher = launcher_of(cell, job.kind, command)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with receiver, sender:
        process = fork.Process(target=_exit_with, args=(command, sender, launcher))
        with started(process):
            process.join()
        if process.exitcode:
            how = f"failed: {receiver.recv()}" if receiver.poll() else _how_it_ended(process.exitcode)
            raise JobError(f"{job.kind} of {cell.folder / job.name} {how}")


def launcher_of(cell: Cell, kind: str, command: Sequence[str]) -> list[str]:
    """The program that starts a job in several processes; empty if it runs in one."""
    if cell.config.launch is None or kind not in LAUNCHED:
        return []
    program, *rest = shlex.split(launch_command(Cluster(1, cell.config.launch), cell.config.strategy, command))
    # the environment of this program need not be on the PATH
    return [shutil.which(program, path=Path(sys.executable).parent) or program, *rest]


def check_finished(cell: Cell) -> None:
    """Raises ConfigError if a job of a finished cell ran with other values than it would get now.

    A recipe may have changed, or another value of a grid may have been chosen. Cells whose checkpoints were removed
    are not compared.
    """
    with_base = cell.files.base.is_file()
    if not is_complete(cell.checkpoint("sft")) or (with_base and not is_complete(base_checkpoint(cell))):
        return
    jobs = [*sft_jobs(cell, with_base=with_base), *preview_jobs(cell), evaluation_job(cell, "http://not.asked")]
    for name, policy in cell.policies.items():
        if isinstance(policy, DprPolicy):
            jobs.append(dpr_job(cell, name, policy, "http://not.asked"))
    for name, policy in cell.policies.items():
        if isinstance(policy, SftPolicy):
            jobs.append(continued_job(cell, name, policy))
        if isinstance(policy, SelfPlayPolicy | RftPolicy):
            jobs.append(own_answers_job(cell, name, policy))
    jobs += [credit_job(cell, source, "http://not.asked") for source in sources(cell)]
    for job in jobs:
        if changed := changed_values(cell, job):
            raise ConfigError(_other_values(cell.folder, [f"{job.name}: {key}" for key in changed]))


def changed_values(cell: Cell, job: Job) -> list[str]:
    """The keys of a job whose values are not those that it was last run with; none if it never ran.

    Keys that only one of the two versions of the program knows are left out.
    """
    path = cell.folder / job.name / CONFIG_NAME
    if not path.is_file():
        return []
    module, _, name = JOBS[job.kind].config.partition(":")
    kind: type[JobConfig] = getattr(importlib.import_module(module), name)
    config = load_config(kind, config_path(job.recipe), arguments(job.overrides))
    now = redacted(config.model_dump(mode="json"))
    started = yaml.safe_load(path.read_text(encoding="utf-8"))
    # the study's folder may have been moved, and its jobs name files by it
    moved = json.dumps(started).replace(str(Path(started["output_dir"]).parent), str(cell.folder))
    return changed_keys(*_in_both(json.loads(moved), now), kind.resume_may_change)


def _in_both(one: Mapping[str, object], other: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """The two mappings with the keys of both, also inside."""
    found: tuple[dict[str, object], dict[str, object]] = ({}, {})
    for key in one.keys() & other.keys():
        mine, theirs = one[key], other[key]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            mine, theirs = _in_both(mine, theirs)
        found[0][key], found[1][key] = mine, theirs
    return found


def _other_values(folder: Path, changed: Sequence[str]) -> str:
    return (
        f"{folder} was finished with other values ({', '.join(changed)}): remove this folder to run it again, or "
        "restore the recipes and values that it was run with"
    )


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by signal {-code}: if you did not do that, memory ran out; start again with fewer processes"
    return f"failed with exit code {code}"


def _exit_with(command: Sequence[str], sender: Connection, launcher: Sequence[str]) -> None:
    """Runs a job's command, and exits with its code. Sends its error too, if it is one that a user can fix.

    With a launcher this process becomes it; errors are then in the cell's log.
    """

    end_with_parent()
    if launcher:
        os.execvp(launcher[0], [*launcher])

    def send_and_print(error: str) -> None:
        sender.send(error[:LONGEST_ERROR])
        with suppress(OSError):
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()

    raise SystemExit(main(command, send_and_print))


@contextmanager
def cpu_time_recorded(cell: Cell) -> Iterator[None]:
    """Records the CPU time of the child processes that end within the block, also if it raises."""
    before_s = _children_cpu_s()
    try:
        yield
    finally:
        cell.folder.mkdir(parents=True, exist_ok=True)
        earlier = cell.cpu_times.read_text() if cell.cpu_times.is_file() else ""
        write_whole(cell.cpu_times, f"{earlier}{_children_cpu_s() - before_s:.1f}\n".encode())


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
