"""Runs what was typed: reads the configuration, takes the run folder, imports the job, and turns errors into lines."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dense_reward import ClientError
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.records import Report

from dense_reward_trainer.commands import JOBS, REPORT, JobSpec
from dense_reward_trainer.configs.base import JobConfig, load_config
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.launch import Cluster, launch_command
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.folder_lock import only_job_in
from dense_reward_trainer.runs.full_disk import reports_full_disk
from dense_reward_trainer.runs.processes import TERMINATED, is_first_to_say, sigterm_exits


def run(options: argparse.Namespace, report_error: Report | None = None) -> int:
    """Runs one job and returns its exit code. An error that a user can fix is one line on stderr, not a traceback.

    `report_error`: is called with such an error instead.
    """
    # Set before they are imported: TRL, transformers and others report each use to the hub otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if options.job == REPORT:
        return _write_report(options, report_error or _report_error)
    skip_bad = [f"{JOBS[options.job].data}.skip_bad=true"] if options.skip_bad else []
    overrides = [*options.overrides, *skip_bad]
    try:
        if options.launch is not None:
            _print_launch(options, overrides)
            return 0
        with sigterm_exits():
            _run(options.job, options.config, overrides)
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
        if not options.output.absolute().parent.is_dir():
            raise ConfigError(f"--output {options.output}: no such folder: make it, or name another file")
        count = write_report(options.runs, options.output)
    except (ConfigError, OSError) as error:
        report_error(str(error))
        return 2
    _report(f"finished: {options.output}, {count} runs; next: open {options.output.absolute().as_uri()} in a browser")
    return 0


def _print_launch(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints the command for several GPUs, if the configuration is valid."""
    config = _resolved(options.job, options.config, overrides)
    if getattr(config, "engine", None) == "own":
        raise ConfigError("--launch: engine own runs in one process: add engine=trl, or leave --launch out")
    print(launch_command(Cluster.of(options.launch), options.strategy, [options.job, options.config, *overrides]))


def _run(name: str, config: str, overrides: Sequence[str]) -> None:
    """Reads the configuration before it imports the job: a typo is reported immediately."""
    resolved = _resolved(name, config, overrides)
    folder = resolved.output_dir
    alone = nullcontext() if resolved.reads_only else only_job_in(folder, _report)
    with _reports_stop(folder), reports_full_disk(folder), alone:
        importlib.import_module(JOBS[name].module).run(resolved, _report)


@contextmanager
def _reports_stop(folder: Path) -> Iterator[None]:
    """Says in one line what to do after Ctrl-C or SIGTERM, and passes it on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or stop.code == TERMINATED:
            by = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
            text = f"stopped by {by}: start the same command again to go on from what is complete in {folder}"
            if is_first_to_say(text):
                _report(text)
        raise


def _resolved(name: str, config: str, overrides: Sequence[str]) -> JobConfig:
    kind = config_class(JOBS[name])
    return load_config(kind, config_path(config, name), overrides).typed_as((config, *overrides))


def config_class(job: JobSpec) -> type[JobConfig]:
    """The class of a job's configuration."""
    module, _, name = job.config.partition(":")
    kind: type[JobConfig] = getattr(importlib.import_module(module), name)
    return kind


def _report(text: str) -> None:
    """Writes a line to stderr, above the progress if there is one."""
    tqdm = sys.modules.get("tqdm")
    with nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr):
        print(text, file=sys.stderr, flush=True)


def _report_error(text: str) -> None:
    _report(f"error: {text}")
