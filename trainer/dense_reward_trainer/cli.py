"""The command `dense-reward-train JOB CONFIG [key.sub=value ...]`. It parses everything before any slow import."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dense_reward import ClientError
from dense_reward.checkpoints.versions import library_versions
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.records import Report

from dense_reward_trainer.configs.base import JobConfig, config_path, load_config, recipe_names
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.launch import STRATEGIES, Cluster, launch_command
from dense_reward_trainer.runs.folder_lock import only_job_in
from dense_reward_trainer.runs.full_disk import reports_full_disk
from dense_reward_trainer.runs.processes import exits_with, is_first_to_say, sigterm_exits


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Where to find a job: `module` has run(config, report); `config` is module:Class, without slow imports.

    `data`: the key of the job's data source, if it has one. `launches`: whether it runs in several processes.
    """

    module: str
    config: str
    help: str
    data: str | None = None
    launches: bool = False


JOBS = {
    "sft": JobSpec(
        "dense_reward_trainer.jobs.sft",
        "dense_reward_trainer.configs.sft:SftConfig",
        "train on demonstrations: an SFT checkpoint and its reference",
        data="data",
        launches=True,
    ),
    "preview": JobSpec(
        "dense_reward_trainer.jobs.preview",
        "dense_reward_trainer.configs.preview:PreviewConfig",
        "before training on the reward: would it help? A verdict from labelled answers, in minutes, without a service",
    ),
    "credit": JobSpec(
        "dense_reward_trainer.jobs.credit",
        "dense_reward_trainer.configs.credit:CreditConfig",
        "measure the reward: does it locate planted errors, and rank right above wrong answers?",
        data="data",
    ),
    "benchmark": JobSpec(
        "dense_reward_trainer.jobs.benchmark",
        "dense_reward_trainer.configs.benchmark:BenchmarkConfig",
        "measure the reward on ProcessBench, PRM800K, PRMBench and RewardBench 2, by their own metrics",
    ),
    "dpr": JobSpec(
        "dense_reward_trainer.jobs.dpr",
        "dense_reward_trainer.configs.dpr:DprConfig",
        "improve a policy on the token rewards of a service (Dense-Path REINFORCE)",
        data="prompts",
    ),
    "irft": JobSpec(
        "dense_reward_trainer.jobs.irft",
        "dense_reward_trainer.configs.irft:IrftConfig",
        "self-play on demonstrations, in rounds: learn to prefer them to own answers (IRFT, SPIN, GSIL)",
        data="data",
    ),
    "rft": JobSpec(
        "dense_reward_trainer.jobs.rft",
        "dense_reward_trainer.configs.rft:RftConfig",
        "learn a reward model (a scalar head on every token) from demonstrations, improve a policy on it, in rounds",
        data="data",
    ),
    "gradient": JobSpec(
        "dense_reward_trainer.jobs.gradient",
        "dense_reward_trainer.configs.dpr:GradientConfig",
        "before a dpr run: would its gradient make held-out answers likelier?",
        data="prompts",
    ),
    "estimators": JobSpec(
        "dense_reward_trainer.studies.options.compare",
        "dense_reward_trainer.studies.options.config:EstimatorsConfig",
        "compare options of dpr on a task whose optimum is known exactly",
    ),
    "sweep": JobSpec(
        "dense_reward_trainer.studies.regimes.study",
        "dense_reward_trainer.studies.regimes.config:SweepConfig",
        "run SFT in several regimes, then DPR and its alternatives at matched KL and FLOPs",
    ),
    "evaluate": JobSpec(
        "dense_reward_trainer.jobs.evaluate",
        "dense_reward_trainer.configs.evaluate:EvaluateConfig",
        "compare policies on held-out prompts: accuracy, likelihood, length and KL",
    ),
    "leaderboard": JobSpec(
        "dense_reward_trainer.jobs.leaderboard",
        "dense_reward_trainer.configs.benchmark:LeaderboardConfig",
        "run lm-evaluation-harness on checkpoints: the Open LLM Leaderboard, or tasks of your own",
    ),
    "judge": JobSpec(
        "dense_reward_trainer.jobs.judge",
        "dense_reward_trainer.configs.judge:JudgeConfig",
        "win rates against a baseline by a judge behind a URL: AlpacaEval 2, Arena-Hard, MT-Bench, LIMA",
    ),
    "sample": JobSpec(
        "dense_reward_trainer.jobs.sample",
        "dense_reward_trainer.configs.sample:SampleConfig",
        "write responses of any policy to a file, also of a tilted one, which needs no training",
    ),
}
REPORT, REPORT_HELP = "report", "collect finished runs into one HTML page: tables, plots, heatmaps and commands"


def command() -> NoReturn:
    """The console command: `main` with the arguments of sys.argv, then the end of the process."""
    exits_with(main)


def main(arguments: Sequence[str] | None = None, report_error: Report | None = None) -> int:
    """Runs one job and returns its exit code. An error that a user can fix is one line on stderr, not a traceback.

    `report_error`: is called with such an error instead.
    """
    # Set before they are imported: TRL, transformers and others report each use to the hub otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    options = _options(arguments)
    if options.job == REPORT:
        return _write_report(options, report_error or _report_error)
    job = JOBS[options.job]
    skip_bad = [f"{job.data}.skip_bad=true"] if options.skip_bad else []
    overrides = [*options.overrides, *skip_bad]
    try:
        if options.launch is not None:
            _print_launch(options, overrides)
            return 0
        with sigterm_exits():
            _run(job, options.config, overrides)
    except (ConfigError, JobError, DataError, CheckpointError, RequestError, ClientError) as error:
        if is_first_to_say(str(error)):
            (report_error or _report_error)(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _write_report(options: argparse.Namespace, report_error: Report) -> int:
    from dense_reward_trainer.reports.page import write_report

    try:
        count = write_report(options.runs, options.output)
    except (ConfigError, OSError) as error:
        report_error(str(error))
        return 2
    _report(f"finished: {options.output}, {count} runs")
    return 0


def _print_launch(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints the command for several GPUs, if the configuration is valid."""
    _resolved(JOBS[options.job], options.config, overrides)
    print(launch_command(Cluster.of(options.launch), options.strategy, [options.job, options.config, *overrides]))


def _run(job: JobSpec, config: str, overrides: Sequence[str]) -> None:
    """Reads the configuration before it imports the job: a typo is reported immediately."""
    resolved = _resolved(job, config, overrides)
    folder = resolved.output_dir
    alone = nullcontext() if resolved.reads_only else only_job_in(folder, _report)
    with reports_full_disk(folder), alone:
        importlib.import_module(job.module).run(resolved, _report)


def _resolved(job: JobSpec, config: str, overrides: Sequence[str]) -> JobConfig:
    module, _, name = job.config.partition(":")
    kind: type[JobConfig] = getattr(importlib.import_module(module), name)
    return load_config(kind, config_path(config), overrides)


class _Parser(argparse.ArgumentParser):
    """Several processes with the same command line report its error once."""

    def error(self, message: str) -> NoReturn:
        if is_first_to_say(message):
            super().error(message)
        self.exit(2)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. Overrides can come before and after --skip-bad; argparse alone would refuse that."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dense-reward-train", description="Trains and measures models: demonstrations -> checkpoints -> policy."
    )
    parser.add_argument("--version", action="version", version=library_versions().get("dense-reward", "not installed"))
    commands = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, job in JOBS.items():
        command = commands.add_parser(name, help=job.help, description=job.help)
        command.add_argument("config", help=f"YAML file, or a shipped recipe: {', '.join(recipe_names())}")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key.sub=value",
            help="overrides of keys of the configuration; values are YAML",
        )
        command.set_defaults(skip_bad=False, launch=None)
        if job.data is not None:
            skip_bad = f"skip lines that are not demonstrations, and report how many ({job.data}.skip_bad=true)"
            command.add_argument("--skip-bad", action="store_true", help=skip_bad)
        if job.launches:
            command.add_argument(
                "--launch", metavar="[MACHINESx]GPUS", help="print the command for so many GPUs, such as 8 or 2x8"
            )
            command.add_argument(
                "--strategy",
                choices=STRATEGIES,
                default="ddp",
                help="with --launch. ddp: each GPU holds the whole model; fsdp2, zero3: the GPUs share it",
            )
    command = commands.add_parser(REPORT, help=REPORT_HELP, description=REPORT_HELP)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a job, or a folder of such")
    command.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    command.set_defaults(overrides=[])
    return parser


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report_error(text: str) -> None:
    _report(f"error: {text}")


if __name__ == "__main__":
    command()
