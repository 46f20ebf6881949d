"""What each subcommand of `dense-reward` does. Models and web libraries are imported only by those that need them."""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import sys

from pydantic import JsonValue

from dense_reward.errors import BulkError, CheckpointError, RequestError, SettingsError
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.settings import Settings, read_settings
from dense_reward.telemetry.logs import configure
from dense_reward.telemetry.process_memory import bound_kernel_caches, grow_gpu_segments, keep_freed_memory

# Longer than load balancers keep an idle connection. Otherwise they would send requests on a closed connection.
KEEP_ALIVE_S = 75


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code. Errors that a user can fix are lines on stderr, no traceback."""
    commands = {"serve": _serve, "check": _check, "score": _score, "stats": _stats, "adopt": _adopt}
    try:
        return commands[options.command](options)
    except (CheckpointError, SettingsError, RequestError, BulkError) as error:
        for line in str(error).splitlines():
            print(f"dense-reward: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _score(options: argparse.Namespace) -> int:
    from dense_reward.bulk.command import score_file

    return score_file(options, _bulk_settings)


def _stats(options: argparse.Namespace) -> int:
    from dense_reward.bulk.stats.command import print_stats

    return print_stats(options)


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
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else started by nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))

    async def serve() -> None:
        code = 0
        try:
            await server.serve()
        except SystemExit as error:  # uvicorn: the port is taken, or the first pairs failed before it was opened
            code = error.code if isinstance(error.code, int) else 1
            if service.state != "failed":
                place = f"{settings.host}:{settings.port}"
                logging.getLogger("dense_reward").error("cannot listen on %s: give another --port or --host", place)
        # To return would wait for every thread that still loads, encodes or computes, whatever --drain-s says.
        exit_now(code or int(service.state == "failed" or not server.started))

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())
    return 1  # not reached
