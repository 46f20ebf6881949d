"""The pages of commands and of settings."""

import argparse
import types
from collections.abc import Iterator
from typing import Literal, Union, get_args, get_origin

from dense_reward import cli as service_cli
from dense_reward.settings import Settings, env_name, flag
from dense_reward_trainer import cli as trainer_cli
from dense_reward_trainer.configs.base import recipe_names

from docs.scripts.markdown import code, page, prose, table
from docs.scripts.type_names import type_name

COMMANDS = """
Every command, with its arguments and flags. `COMMAND --help` prints the same. In a terminal, exit code 0 means success,
2 a wrong argument, file or setting, 130 an interrupt from the keyboard.
"""
SETTINGS = """
Every setting of `dense-reward serve`, as a flag and as an environment variable. The flag overrides the variable, which
overrides the default. Variables that begin with `DENSE_REWARD_` but name no setting are refused.
[operations.md](../operations.md) explains keys, limits and sizes. `dense-reward check` and `dense-reward score` take
the settings that concern models.
"""


def commands_page() -> str:
    """Both command lines: each command with the rows of its arguments."""
    service = [_section("dense-reward", name, parser) for name, parser in subcommands(service_cli._parser())]
    trainer = [_section("dense-reward-train", name, parser) for name, parser in subcommands(trainer_cli._parser())]
    return page("Commands", COMMANDS, *service, *trainer)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                command.description = command.description or helps(action).get(name)
                yield name, command


def helps(action: "argparse._SubParsersAction[argparse.ArgumentParser]") -> dict[str, str]:
    """The help text of each command in the list of commands."""
    return {choice.dest: choice.help or "" for choice in action._choices_actions}


def _section(program: str, name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    settings = [action for action in actions if action.dest in Settings.model_fields]
    own = [action for action in actions if action not in settings]
    text = f"{_sentence(parser.description or '')}\n\n" if parser.description else ""
    if settings:
        text += f"Takes {_how_many(settings)} [settings](settings.md) as flags.\n\n"
    if name in trainer_cli.JOBS:
        text += f"Its keys: [{name}](recipes.md#{name}).\n\n"
    rows = [(_argument(action), prose(_help(action))) for action in own]
    return f"## {program} {name}\n\n{text}{table(('argument', 'meaning'), rows)}"


def _how_many(settings: list[argparse.Action]) -> str:
    return "all" if len(settings) == len(Settings.model_fields) else f"{len(settings)} of the"


def _sentence(text: str) -> str:
    return prose(text[:1].upper() + text[1:].rstrip(".") + ".")


def _argument(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return code(metavar if action.nargs in {"*", "+"} else action.dest)
    if action.choices is not None:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    value = "" if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) else f" {metavar}"
    return ", ".join(code(option + value) for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    """The help text. The list of all recipes, which every job repeats, is replaced by a short one."""
    text = (action.help or "").replace(f": {', '.join(recipe_names())}", "")
    default = action.default
    shown = default not in {None, False, argparse.SUPPRESS} and "default" not in text and action.nargs != 0
    return f"{text} (default: {default})" if shown and isinstance(default, (str, int, float)) else text


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "none" if field.default is None else code(str(field.default))
        option = f"--no-{name.replace('_', '-')}" if field.default is True else flag(name)
        kind = _kind(field.annotation)
        rows.append((code(option), code(env_name(name)), code(kind), default, prose(field.description or "")))
    return page("Settings of the service", SETTINGS, table(("flag", "variable", "type", "default", "meaning"), rows))


def _kind(annotation: object) -> str:
    kinds = get_args(annotation) if get_origin(annotation) in {types.UnionType, Union} else (annotation,)
    (kind,) = [kind for kind in kinds if kind is not types.NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return type_name(kind)
