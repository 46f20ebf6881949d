"""A command line as a shell reads it, checked as far as it can be without running it."""

import argparse
import re
import shlex

from dense_reward.command_line.arguments import parser
from dense_reward.settings import Settings, read_settings
from dense_reward_trainer.commands import JOBS, parsed
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.job_runner import config_class
from dense_reward_trainer.recipe_files import config_path


def resolve(line: str) -> argparse.Namespace:
    """The options of a `dense-reward` command, or the keys of a job's configuration, with its recipe and overrides.

    Fails if the parser, the settings or the configuration refuses it.
    """
    program, *words = shlex.split(line, comments=True)
    if program == "dense-reward":
        options: argparse.Namespace = parser().parse_args(words)
        read_settings({name: value for name, value in vars(options).items() if name in Settings.model_fields}, ())
        return options
    assert program == "dense-reward-train", line
    options = parsed(words)
    if options.job not in JOBS:
        return options
    config = load_config(config_class(JOBS[options.job]), config_path(options.config, options.job), options.overrides)
    return argparse.Namespace(**dict(config))


def next_commands(line: str) -> list[str]:
    """The commands in the last line of a job, `finished: PATH; next: COMMAND, or COMMAND`, each of which resolves."""
    _, _, words = line.partition("; next: ")
    found = re.findall(r"dense-reward(?:-train)? .+?(?=, or |$)", words)
    assert found, line
    for command in found:
        resolve(command)
    return found
