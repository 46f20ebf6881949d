"""The command `dense-reward`. Heavy libraries are imported only after the arguments are parsed."""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import JsonValue

from dense_reward.bulk.arguments import OF_A_SERVER, add_score
from dense_reward.bulk.stats.arguments import add_stats
from dense_reward.checkpoints.versions import library_versions
from dense_reward.errors import BulkError, CheckpointError, RequestError, SettingsError
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.settings import Settings, env_name, flag, read_settings
from dense_reward.telemetry.logs import configure
from dense_reward.telemetry.process_memory import bound_kernel_caches, grow_gpu_segments, keep_freed_memory

# Longer than load balancers keep an idle connection. Otherwise they would send requests on a closed connection.
KEEP_ALIVE_S = 75
METAVARS: dict[object, str] = {Path: "PATH", int: "N", float: "X", str: "TEXT"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that a user can fix are lines on stderr, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except (CheckpointError, SettingsError, RequestError, BulkError) as error:
        for line in str(error).splitlines():
            print(f"dense-reward: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dense-reward", description="Per-token rewards from two SFT checkpoints.")
    parser.add_argument("--version", action="version", version=library_versions().get("dense-reward", "not installed"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve the rewards of a pair of checkpoints over HTTP", allow_abbrev=False
    )
    _add_settings(serve)
    serve.set_defaults(command=_serve)
    noise = "measure the rounding noise of the rewards, and which settings lower it"
    check = commands.add_parser("check", help=noise, allow_abbrev=False)
    _add_settings(check)
    check.set_defaults(command=_check)
    score = commands.add_parser("score", help="score the rows of a file or data set", allow_abbrev=False)
    _add_settings(score, leave_out=OF_A_SERVER)
    add_score(score, _bulk_settings)
    add_stats(commands.add_parser("stats", help="distributions of scored files, and their lowest-reward spans"))
    _add_adopt(commands.add_parser("adopt", help="write the manifest of a checkpoint that another trainer saved"))
    return parser


def _add_settings(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add a flag for each field of Settings. If a flag is left out, the environment or else the default is used."""
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
        metavar = f"{{{','.join(values)}}}" if values else METAVARS[kinds[0]]
        parser.add_argument(flag(name), default=argparse.SUPPRESS, choices=choices, metavar=metavar, help=text)


def _alternatives(annotation: object) -> tuple[object, ...]:
    """The types of a union; any other type as it is."""
    return get_args(annotation) if get_origin(annotation) in {types.UnionType, Union} else (annotation,)


def _plain(kind: object) -> object:
    """int for Annotated[int, ...]."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, hub id, or hub id@revision")
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
    parser.set_defaults(command=_adopt)


def _adopt(options: argparse.Namespace) -> int:
    from dense_reward.checkpoints.adopt import adopt
    from dense_reward.heatmap.example import render_example

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)
    adopt(
        options.source,
        role=options.role,
        run_id=options.run_id,
        renderer=options.renderer,
        end_of_turn=options.end_of_turn,
        dtype=options.dtype,
        device=options.device,
        out=options.out,
        template_kwargs=_json_object("--template-kwargs", options.template_kwargs),
        response_prefix=options.response_prefix,
        template_date=options.template_date,
        ignore_manifest=options.ignore_manifest,
        check=options.check,
        report=lambda line: print(line, flush=True),
        draw=lambda example: render_example(example, columns=columns, colour=colour),
    )
    return 0


def _json_object(name: str, text: str | None) -> dict[str, JsonValue] | None:
    """Raises SettingsError if the text is not a JSON object."""
    try:
        value = None if text is None else json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{name} is not JSON ({error}): write it as '{{\"name\": false}}'") from None
    if value is not None and not isinstance(value, dict):
        raise SettingsError(f"{name} must be a JSON object, as '{{\"name\": false}}'")
    return value


def _settings(options: argparse.Namespace) -> Settings:
    """The settings of a command that computes. Also bounds and tunes the process's memory for it."""
    keep_freed_memory()
    bound_kernel_caches()
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    settings = read_settings(given, os.environ.keys())
    if settings.engine == "torch":  # vLLM has its own allocations
        grow_gpu_segments()
    names_pairs = settings.pairs_file is not None or settings.run is not None
    names_pairs = names_pairs or settings.token_head is not None
    if settings.engine != "fake" and not names_pairs and None in {settings.sft, settings.reference}:
        raise SettingsError("give both checkpoints: --sft DIR --reference DIR (or --run DIR, the folder of an SFT run)")
    return settings


def _bulk_settings(options: argparse.Namespace) -> Settings:
    settings = _settings(options)
    configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    return settings


def _check(options: argparse.Namespace) -> int:
    settings, *others = first_pairs(_settings(options))
    if settings.sft is None or settings.reference is None:
        raise SettingsError("check measures two checkpoints: give --sft DIR --reference DIR, or --run DIR")
    from dense_reward.engines.torch.load import serving_options
    from dense_reward.engines.torch.noise import exact_rewards, measure_noise

    def report(line: str) -> None:
        print(f"  {line}", file=sys.stderr)

    if others:
        report(f"measuring {settings.name}, the first of {len(others) + 1} pairs (another: --sft DIR --reference DIR)")
    serving = serving_options(settings)
    exact = exact_rewards(settings.sft, settings.reference, serving, report)
    print("reward noise: rms(reward - float32 reward) / std(float32 reward), with", end=" ")
    print(f"std(float32 reward) = {exact.std:.3g} nats over {len(exact.reward_S)} tokens of the probe")
    print("seconds: time of a batch of 8 responses of 64 tokens to one prompt\n")
    print(f"{'configuration':32} {'reward noise':>12} {'seconds':>9} {'weights':>11}")
    for found in measure_noise(settings.sft, settings.reference, serving, exact, report):
        if found.noise is None or found.weights_bytes is None:
            print(f"{found.name:32} not possible: {found.refused}")
        else:
            print(f"{found.name:32} {found.noise:12.2g} {found.seconds:9.3g} {found.weights_bytes / 1e6:8,.0f} MB")
    return 0


def _check_access(settings: Settings) -> None:
    if (settings.tls_certificate is None) != (settings.tls_private_key is None):
        raise SettingsError("give both or neither: --tls-certificate FILE --tls-private-key FILE")
    for file in (settings.tls_certificate, settings.tls_private_key):
        if file is not None and not file.is_file():
            raise SettingsError(f"{file} is not a file: correct --tls-certificate or --tls-private-key")
    if settings.isolate_keys and settings.api_keys_file is None:
        raise SettingsError("--isolate-keys needs keys: give --api-keys-file FILE too")
    if settings.api_keys_file is None and settings.host not in {"127.0.0.1", "::1", "localhost"}:
        logging.getLogger("dense_reward").warning(
            "every host that reaches %s:%s can send requests: give --api-keys-file FILE to require a key",
            settings.host,
            settings.port,
        )


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options)
    configure(settings.log_level, settings.log_format)
    _check_access(settings)
    first_pairs(settings)
    import uvicorn

    from dense_reward.http.app import create_app
    from dense_reward.http.server import Server, connection, exit_now, raise_open_files
    from dense_reward.serving.loaders import loader
    from dense_reward.serving.service import Service

    raise_open_files()

    def stop(*_: object) -> None:
        server.should_exit = True

    service = Service(settings, loader(settings.engine), stop)
    server = Server(
        uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            ws="none",
            http=connection(settings.max_arrival_s),
            log_config=None,
            access_log=False,
            server_header=False,
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_private_key,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.drain_s,
        ),
        service.drain,
    )
    # uvicorn (0.54) restores these handlers once it has drained, and raises the signal again. The default handlers
    # would then kill the process; with these it ends with exit code 0. They also replace an inherited SIG_IGN.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    async def serve() -> None:
        code = 0
        try:
            await server.serve()
        except SystemExit as error:  # uvicorn: the port is taken, or the first pairs failed before it was opened
            code = error.code if isinstance(error.code, int) else 1
        # To return would wait for every thread that still loads, encodes or computes, whatever --drain-s says.
        exit_now(code or int(service.state == "failed" or not server.started))

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())
    return 1  # not reached


if __name__ == "__main__":
    sys.exit(main())
