"""The command `dense-reward-train JOB CONFIG [key.sub=value ...]`: parse first, heavy imports after."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from dense_reward import ClientError
from dense_reward.errors import CheckpointError

from dense_reward_trainer.configs.base import config_path, load_config, recipe_names
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.processes import end_when_terminated


@dataclass(frozen=True, slots=True)
class Job:
    """Where a job lives: `module` has run(config, report), `config` is module:Class and light to import.

    `data`: the key of its data source, where it has one.
    """

    module: str
    config: str
    help: str
    data: str | None = None


JOBS = {
    "sft": Job(
        "dense_reward_trainer.jobs.sft",
        "dense_reward_trainer.configs.base:SftConfig",
        "demonstrations -> an SFT checkpoint and its reference",
        data="data",
    ),
    "credit": Job(
        "dense_reward_trainer.jobs.credit",
        "dense_reward_trainer.configs.credit:CreditConfig",
        "does the reward find a planted error, and rank right above wrong answers?",
        data="data",
    ),
    "dpr": Job(
        "dense_reward_trainer.jobs.dpr",
        "dense_reward_trainer.configs.dpr:DprConfig",
        "a policy and a reward service -> an improved policy",
        data="prompts",
    ),
    "gradient": Job(
        "dense_reward_trainer.jobs.gradient",
        "dense_reward_trainer.configs.dpr:GradientConfig",
        "would dpr with this reward make held-out answers likelier? Asked of its gradient, before any step",
        data="prompts",
    ),
    "estimators": Job(
        "dense_reward_trainer.studies.compare_options",
        "dense_reward_trainer.studies.compare_options_config:EstimatorsConfig",
        "options of dpr compared on a task whose optimum is known exactly",
    ),
    "sweep": Job(
        "dense_reward_trainer.studies.regimes",
        "dense_reward_trainer.studies.regimes_config:SweepConfig",
        "SFT under several regimes, what DPR makes of each, and its alternatives at matched KL and FLOPs",
    ),
    "evaluate": Job(
        "dense_reward_trainer.jobs.evaluate",
        "dense_reward_trainer.configs.dpr:EvaluateConfig",
        "checkpoints -> accuracy, likelihood, length and KL on held-out prompts, side by side",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; its exit code. What a user can mend is one line on stderr, not a traceback."""
    options = _options(arguments)
    end_when_terminated()
    job = JOBS[options.job]
    skip_bad = [f"{job.data}.skip_bad=true"] if options.skip_bad else []
    try:
        _run(job, options.config, [*options.overrides, *skip_bad])
    except (ConfigError, JobError, DataError, CheckpointError, ClientError) as error:
        _report(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(job: Job, config: str, overrides: Sequence[str]) -> None:
    """The configuration is read before anything slow is imported: a typing error shows at once."""
    module, _, name = job.config.partition(":")
    resolved = load_config(getattr(importlib.import_module(module), name), config_path(config), overrides)
    importlib.import_module(job.module).run(resolved, _report)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; changes to the configuration may stand before and after --skip-bad."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dense-reward-train", description="Demonstrations -> checkpoints -> policy.")
    parser.add_argument("--version", action="version", version=version("dense-reward"))
    commands = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, job in JOBS.items():
        command = commands.add_parser(name, help=job.help, description=job.help)
        command.add_argument("config", help=f"YAML file, or a shipped recipe: {', '.join(recipe_names())}")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
        command.set_defaults(skip_bad=False)
        if job.data is not None:
            skip_bad = f"leave out and count lines that are no demonstrations ({job.data}.skip_bad=true)"
            command.add_argument("--skip-bad", action="store_true", help=skip_bad)
    return parser


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
