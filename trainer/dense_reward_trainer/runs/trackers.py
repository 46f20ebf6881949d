"""Sends the metrics of a run to experiment trackers. Each is imported only if `report_to` names it."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dense_reward_trainer.configs.base import Tracker
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.run_folder import Run, SendMetrics

PROJECT = "dense-reward"


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises ConfigError if a tracker is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to names {' and '.join(missing)}, which is not installed: pip install {' '.join(missing)}, or "
            "leave it out of report_to"
        )


def open_trackers(
    names: Sequence[Tracker], run: Run, values: Mapping[str, object], done: int
) -> tuple[SendMetrics, ...]:
    """One function for each tracker, which sends the metrics of a step. Raises ConfigError if one is not installed.

    `values`: the configuration, without secrets. `done`: the step that a resumed run continues from.
    """
    check_trackers(names)
    makers: Mapping[Tracker, Callable[[], SendMetrics]] = {
        "tensorboard": lambda: _tensorboard(run.folder, done),
        "wandb": lambda: _wandb(run, values),
        "trackio": lambda: _trackio(run, values),
    }
    return tuple(makers[name]() for name in dict.fromkeys(names))


def _tensorboard(folder: Path, done: int) -> SendMetrics:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def send(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def _wandb(run: Run, values: Mapping[str, object]) -> SendMetrics:
    import wandb  # noqa: PLC0415 - an optional package

    started: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.run_id,
        name=os.environ.get("WANDB_NAME", run.folder.name),
        dir=str(run.folder),
        config=dict(values),
        resume="allow",
    )
    return lambda step, metrics: started.log(dict(metrics), step=step)


def _trackio(run: Run, values: Mapping[str, object]) -> SendMetrics:
    import trackio  # noqa: PLC0415 - an optional package

    started: Any = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run.run_id, config=dict(values), resume="allow"
    )
    return lambda step, metrics: started.log(dict(metrics), step=step)
