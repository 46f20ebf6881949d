"""What can be said of a block without running it: does it parse, and do its commands, flags, keys and names exist?"""

import ast
import configparser
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import yaml
from dense_reward.command_line import arguments as service
from dense_reward.settings import Settings
from dense_reward_trainer import commands as trainer
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.job_runner import config_class
from dense_reward_trainer.recipe_files import config_path, recipe_names
from pydantic import ValidationError

from docs.scripts.blocks import ROOT, Block

COMMAND = re.compile(
    r"(?:^\s*|&& |; |\| |/bin/|python -m |-m )(dense-reward(?:-train)?|make|dense_reward_trainer\.cli)\s"
)
END = re.compile(r"\s(?:&&?|\|\|?|;|>>?|2>)(?:\s|$)|\s#.*$")


def faults(block: Block) -> list[str]:
    """What is wrong with a block, each with its place."""
    check = CHECKS.get(block.language)
    if check is None:
        return [f"{block.place}: no language: name it, or `text` if it is output"]
    return [f"{block.place}: {fault}" for fault in check(block.text)]


def _python(text: str) -> Iterator[str]:
    try:
        ast.parse(text)
    except SyntaxError as error:
        yield f"{error.msg}: {error.text}"


def _json(text: str) -> Iterator[str]:
    try:
        json.loads(text)
    except ValueError as error:
        yield str(error)


def _yaml(text: str) -> Iterator[str]:
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield str(error)


def _ini(text: str) -> Iterator[str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # systemd's keys have capitals
    try:
        parser.read_string(text)
    except configparser.Error as error:
        yield str(error)
        return
    for section in parser.values():
        if command := section.get("ExecStart"):
            yield from _sh(command)


def _sh(text: str) -> Iterator[str]:
    parsed = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    if parsed.returncode:
        yield parsed.stderr.strip()
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#"):
            continue
        for found in COMMAND.finditer(line):
            rest = END.split(line[found.end() :] + " ")[0]
            if fault := command_fault(found[1], rest):
                yield f"{found[1]} {rest.strip()}: {fault}"


def command_fault(program: str, rest: str) -> str | None:
    """Why the real parser refuses a command; None if it does not."""
    try:
        words = [word for word in shlex.split(rest) if word not in {"&", "..."}]
    except ValueError:  # a quotation that ends on another line
        return None
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        return next((f"no target {word}" for word in words if word.islower() and word not in targets), None)
    check = _service if program == "dense-reward" else _trainer
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            check(words)
    except SystemExit as exit_:
        return said.getvalue().strip().splitlines()[-1] if exit_.code else None
    except (ConfigError, ValidationError) as error:
        return str(error)
    return None


def _service(words: list[str]) -> None:
    options = service.parser().parse_args(words)
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    Settings.model_validate(given)


def _trainer(words: list[str]) -> None:
    """Parses a command, and reads its recipe with the overrides if the recipe ships."""
    options = trainer.parsed(words)
    if options.job in trainer.JOBS and options.config in recipe_names():
        load_config(
            config_class(trainer.JOBS[options.job]), config_path(options.config, options.job), options.overrides
        )


CHECKS: dict[str, Callable[[str], Iterator[str]]] = {
    "python": _python,
    "json": _json,
    "yaml": _yaml,
    "ini": _ini,
    "sh": _sh,
}
