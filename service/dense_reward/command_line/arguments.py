"""What can be typed after `dense-reward`: subcommands, flags and examples. Heavy libraries are never imported here."""

import argparse
import types
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from dense_reward.command_line.parser import CommandParser, PrintCompletion, ShowVersion

PROGRAM = "dense-reward"
EXAMPLES = {
    "adopt": (
        "dense-reward adopt path/to/final --role sft --run-id mine",
        "dense-reward adopt path/to/checkpoint-500 --role reference --run-id mine",
        "dense-reward adopt path/to/final --role sft --check   # report only, write nothing",
    ),
    "serve": (
        "dense-reward serve --run runs/demo --port 8000   # a pair for each reference of the run",
        "dense-reward serve --sft path/to/final --reference path/to/checkpoint-500",
    ),
    "check": (
        "dense-reward check --run runs/demo",
        "dense-reward check --sft path/to/final --reference path/to/checkpoint-500 --dtype bfloat16",
    ),
    "score": (
        "dense-reward score answers.jsonl --out scored.jsonl --run runs/demo",
        "dense-reward score answers.parquet --out scored.parquet --url http://127.0.0.1:8000",
        "dense-reward score answers.jsonl --out scored.jsonl --run runs/demo --columns prompt=question,response=answer",
    ),
    "stats": (
        "dense-reward stats scored.jsonl",
        "dense-reward stats scored_1.parquet scored_2.parquet --lowest 50 --json stats.json",
    ),
}


def parser() -> CommandParser:
    """The parser of the command line; the name of the subcommand is in `command`."""
    top = CommandParser(
        prog=PROGRAM,
        description="Per-token rewards from two checkpoints of one SFT run.",
        examples=(EXAMPLES["adopt"][0], EXAMPLES["serve"][0], "dense-reward serve --help"),
    )
    top.add_argument("--version", action=ShowVersion)
    top.add_argument("--print-completion", action=PrintCompletion)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (text, fill) in _COMMANDS.items():
        # with abbreviations, a new flag could change what an old command line means
        abbrev = name in {"stats", "adopt"}
        commands.add_parser(
            name, help=text, description=_sentence(text), allow_abbrev=abbrev, fill=fill, examples=EXAMPLES[name]
        )
    return top


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_score(parser: CommandParser) -> None:
    from dense_reward.bulk.arguments import OF_A_SERVER, add_score

    _add_settings(parser, leave_out=OF_A_SERVER)
    add_score(parser)


def _add_stats(parser: CommandParser) -> None:
    from dense_reward.bulk.stats.arguments import add_stats

    add_stats(parser)


def _add_settings(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add a flag for each field of Settings. If a flag is left out, the environment or else the default is used."""
    from dense_reward.settings import Settings, env_name, flag  # pydantic costs a tenth of a second

    metavars: dict[object, str] = {Path: "PATH", int: "N", float: "X", str: "TEXT"}
    for name, field in Settings.model_fields.items():
        if name in leave_out:
            continue
        kinds = [_plain(kind) for kind in _alternatives(field.annotation) if kind is not types.NoneType]
        default = "" if field.default is None else f"; default: {field.default}"
        text = f"{field.description} [{env_name(name)}{default}]"
        if kinds == [bool]:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        values = get_args(kinds[0])  # the choices of a Literal
        choices = values if get_origin(field.annotation) is Literal else None
        metavar = f"{{{','.join(values)}}}" if values else metavars[kinds[0]]
        parser.add_argument(flag(name), default=argparse.SUPPRESS, choices=choices, metavar=metavar, help=text)


def _alternatives(annotation: object) -> tuple[object, ...]:
    """The types of a union; any other type as it is."""
    return get_args(annotation) if get_origin(annotation) in {types.UnionType, Union} else (annotation,)


def _plain(kind: object) -> object:
    """int for Annotated[int, ...]."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT", help="folder, hub id, or hub id@revision")
    parser.add_argument(
        "--role",
        choices=["sft", "reference", "policy", "token_head"],
        help="sft: the finished checkpoint; reference: the earlier one; policy: a model trained on the rewards; "
        "token_head: a reward model with a scalar head (AutoModelForSequenceClassification with one label). "
        "Options that are left out, --role too, are taken from the checkpoint's manifest, if it has one",
    )
    parser.add_argument("--run-id", metavar="TEXT", help="checkpoints with equal run ids belong to one run")
    parser.add_argument(
        "--renderer",
        choices=["chat", "plain", "instruction"],
        help="how prompts become text; if left out, chat, which needs a chat template",
    )
    parser.add_argument(
        "--end-of-turn", metavar="TEXT", help="token that ends a response; if left out, that of the chat template"
    )
    parser.add_argument(
        "--dtype", metavar="TEXT", help="dtype to serve in; if left out, that of the checkpoint's configuration"
    )
    parser.add_argument(
        "--device", metavar="TEXT", default="cpu", help="device that computes the probe, in float32; default cpu"
    )
    parser.add_argument(
        "--template-kwargs", metavar="JSON", help="variables that the chat template always gets, as a JSON object"
    )
    parser.add_argument(
        "--response-prefix",
        metavar="TEXT",
        help="text between the generation prompt and a response: context, not scored; empty: no text between them",
    )
    parser.add_argument(
        "--template-date",
        metavar="DATE",
        help="YYYY-MM-DD, for a chat template that writes the date; if left out, today",
    )
    parser.add_argument("--out", metavar="PATH", type=Path, help="write the manifest to this folder, not to the source")
    parser.add_argument(
        "--ignore-manifest", action="store_true", help="take nothing from a manifest that the checkpoint already has"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="report as in an adoption, but write nothing; also verify an existing manifest. Exit code 2 if the "
        "checkpoint cannot be adopted or its manifest does not match",
    )


_COMMANDS = {
    "serve": ("serve the rewards of a pair of checkpoints over HTTP", _add_settings),
    "check": ("measure the rounding noise of the rewards, and which settings lower it", _add_settings),
    "score": ("score the rows of a file or data set", _add_score),
    "stats": ("distributions of scored files, and their lowest-reward spans", _add_stats),
    "adopt": ("write the manifest of a checkpoint that another trainer saved", _add_adopt),
}
