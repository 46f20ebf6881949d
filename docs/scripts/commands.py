"""The pages of commands and of settings."""

import argparse
import types
from typing import Literal, Union, get_args, get_origin

from dense_reward.command_line import arguments as service
from dense_reward.settings import Settings, env_name, flag
from dense_reward_trainer import commands as trainer

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
    programs = (("dense-reward", service.parser()), ("dense-reward-train", trainer.parser()))
    sections = [_section(program, *one) for program, top in programs for one in top.subcommands().items()]
    return page("Commands", COMMANDS, *sections)


def _section(program: str, name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    settings = [action for action in actions if action.dest in Settings.model_fields]
    own = [action for action in actions if action not in settings]
    text = f"{_sentence(parser.description or '')}\n\n" if parser.description else ""
    if settings:
        text += f"Takes {_how_many(settings)} [settings](settings.md) as flags.\n\n"
    if name in trainer.JOBS:
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
    text = action.help or ""
    default = action.default
    shown = isinstance(default, (str, int, float)) and default not in {False, argparse.SUPPRESS} and action.nargs != 0
    return f"{text} (default: {default})" if shown and "default" not in text else text


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
