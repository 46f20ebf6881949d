"""The run folder: resolved configuration, versions, commit, command lines, metrics.jsonl and its plot.

Secrets are redacted.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.checkpoints.versions import library_versions
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, ValidationError

from dense_reward_trainer.configs.base import JobConfig, changed_values
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.folder_lock import check_place
from dense_reward_trainer.runs.pictures import without_data, write_picture

CONFIG_NAME, RECORD_NAME, METRICS_NAME = "config.yaml", "run.json", "metrics.jsonl"
REDACTED = "[redacted]"
_LONGEST_VALUES = 60
_SECRET_NAME = re.compile(r"(^|_)(key|apikey|token|secret|password|credentials?)$", re.IGNORECASE)
_URL_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")


class RunRecord(BaseModel):
    """Content of `run.json`. `identity`: hashes (data, tokenizer, policy) that must be equal when a run is resumed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    run_id: str
    started_at: str
    commit: str | None
    commands: tuple[str, ...]
    versions: dict[str, str]
    identity: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """An open run folder. `resumed`: the run was started earlier."""

    folder: Path
    run_id: str
    resumed: bool


def check_run(job: str, config: JobConfig) -> None:
    """Checks that `config.output_dir` can be used. Writes nothing, so a job that fails early leaves no run folder.

    Raises ConfigError if the folder cannot be written to, or holds a run of another job, or of a configuration that
    gives a different result.
    """
    folder = config.output_dir
    check_place(folder)
    record = _read_record(folder)
    if record is not None:
        _check_job(folder, record, job)
        _check_config(folder, config)


def open_run(job: str, config: JobConfig) -> Run:
    """Starts a run in `config.output_dir`, or resumes the run in it. Raises ConfigError like `check_run`."""
    check_run(job, config)
    folder = config.output_dir
    record = _read_record(folder)
    now = RunRecord(
        job=job,
        run_id=f"{job}-{uuid.uuid4().hex[:12]}" if record is None else record.run_id,
        started_at=datetime.now(UTC).isoformat(timespec="seconds") if record is None else record.started_at,
        commit=commit(),
        commands=(*(record.commands if record else ()), command_line(sys.argv)),
        versions=versions(),
        identity={} if record is None else record.identity,
    )
    folder.mkdir(parents=True, exist_ok=True)
    values = redacted(config.model_dump(mode="json"))
    write_whole(folder / CONFIG_NAME, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    _write_record(folder, now)
    return Run(folder, now.run_id, resumed=record is not None)


def pin(run: Run, identity: Mapping[str, str]) -> None:
    """Records the hashes of a run's inputs (data, tokenizer ...: name -> hash) in `run.json`.

    Raises ConfigError if the hashes of a resumed run differ; it names the inputs that differ.
    """
    record = _read_record(run.folder)
    if record is None:
        raise ConfigError(f"{run.folder / RECORD_NAME} is gone: use another output_dir")
    changed = changed_inputs(run.folder, identity)
    if changed:
        raise ConfigError(
            f"{run.folder} holds a run that was started with different inputs ({', '.join(changed)}): restore them, or "
            "use another output_dir"
        )
    _write_record(run.folder, record.model_copy(update={"identity": dict(identity)}))


def read_run(folder: Path) -> RunRecord:
    """The record of the run in a folder. Raises ConfigError if there is none, or it cannot be read."""
    record = _read_record(folder)
    if record is None:
        raise ConfigError(f"{folder} holds no run: name the output_dir of a job")
    return record


def pinned(folder: Path) -> Mapping[str, str]:
    """What `pin` has recorded for the run in a folder; nothing if there is none."""
    record = _read_record(folder)
    return {} if record is None else record.identity


def changed_inputs(folder: Path, identity: Mapping[str, str]) -> list[str]:
    """Names of the inputs whose recorded hashes differ; none without a run, or if an older version recorded fewer."""
    return [name for name, sha256 in pinned(folder).items() if identity.get(name) != sha256]


def changed_versions(folder: Path) -> list[str]:
    """Libraries whose versions differ from those of the run's last start, each as `name 1.0 -> 2.0`."""
    record, now = _read_record(folder), versions()
    recorded = {} if record is None else record.versions
    return [f"{name} {old} -> {now.get(name)}" for name, old in recorded.items() if now.get(name) != old]


def redacted(values: Mapping[str, object]) -> dict[str, object]:
    """The values with secrets replaced: values of names such as `api_key`, and credentials in URLs."""
    safe: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            safe[name] = redacted(value)
        elif value is not None and _SECRET_NAME.search(name):
            safe[name] = REDACTED
        else:
            safe[name] = without_secrets(value) if isinstance(value, str) else value
    return safe


def without_secrets(text: str) -> str:
    """The text with the credentials in its URLs replaced."""
    return _URL_SECRET.sub(REDACTED, text)


def command_line(arguments: Sequence[str]) -> str:
    """The command, quoted for a shell, with secrets redacted."""
    safe = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = equals and _SECRET_NAME.search(name.rpartition(".")[2])
        safe.append(f"{name}={REDACTED}" if secret else without_secrets(argument))
    return shlex.join(safe)


SendMetrics = Callable[[int, Mapping[str, float]], None]
"""Sends the metrics of a step to a tracker."""


@dataclass(frozen=True, slots=True)
class MetricsLog:
    """metrics.jsonl: one JSON object for each logged step. The `trackers` get the same numbers."""

    path: Path
    trackers: tuple[SendMetrics, ...] = ()

    def append(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends a line. Raises JobError if a value is not finite: training has diverged."""
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise JobError(
                    f"{name} is {value} at step {step}: training has diverged; start again in another output_dir with "
                    "a lower learning_rate or more warmup_steps"
                )
        self._drop_half_line()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        for send in self.trackers:
            send(step, {name: value for name, value in values.items() if value is not None})

    def _drop_half_line(self) -> None:
        """Removes a last line that a full disk cut off: the next one would continue it, and neither could be read."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def read(self) -> list[dict[str, float | None]]:
        """All complete lines; skips a last line that a kill cut off."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def drop_after(self, step: int) -> None:
        """Removes the lines of later steps: a resumed run computes them again."""
        kept = [line for line in self.read() if (line["step"] or 0) <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def plot_metrics(metrics: MetricsLog, keys: Sequence[str], path: Path, *, ylabel: str) -> None:
    """Plots each key over the steps as a PNG; skips keys that were never logged, and says so if none was."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = metrics.read()
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    else:
        without_data(axes, f"no step logged {' or '.join(keys)}")
    write_picture(figure, path)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    return {"python": sys.version.split()[0], **library_versions()}


def commit() -> str | None:
    """The commit of this program, with -dirty if files were changed; None outside a git checkout."""
    found = _git("rev-parse", "HEAD")
    if not found:
        return None
    # `git describe --dirty` writes the index: ended by a full disk, it would leave a lock in the checkout.
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if changed else found


def _git(*arguments: str) -> str | None:
    """What git prints about the checkout of this program; None if it cannot."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read_record(folder: Path) -> RunRecord | None:
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{path} is not the record of a run ({reason}): use another output_dir") from None


def _write_record(folder: Path, record: RunRecord) -> None:
    write_whole(folder / RECORD_NAME, record.model_dump_json(indent=2).encode() + b"\n")


def _check_job(folder: Path, record: RunRecord, job: str) -> None:
    if record.job != job:
        raise ConfigError(f"{folder} holds a run of {record.job}, not of {job}: use another output_dir")


def _check_config(folder: Path, config: JobConfig) -> None:
    """A key that the program did not know when the run was started had the value that is its default today."""
    started = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    with suppress(ValidationError):  # a key that is gone, or a value that is refused today: the comparison names it
        started = redacted(type(config).model_validate(started).model_dump(mode="json"))
    changed = changed_values(started, redacted(config.model_dump(mode="json")), config.resume_may_change)
    if changed:
        raise ConfigError(
            f"{folder} holds a run that was started with a different configuration "
            f"({', '.join(_difference(key, *values) for key, values in changed.items())}), so its results so far would "
            "not be those of this one: use another output_dir, or the configuration that it was started with"
        )


def _difference(key: str, before: object, now: object) -> str:
    """Such as `seed: 0 -> 1`; the name alone of values that are long."""
    words = f"{before!s} -> {now!s}"
    return f"{key}: {words}" if len(words) <= _LONGEST_VALUES else key
