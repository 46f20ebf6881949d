"""Runs a job's command, and signals its own process at the same point of every run.

`python killed_job.py SIGNAL AT JOB CONFIG [key.sub=value ...]`: AT is a step, after which metrics.jsonl has a line, or
the name of a file, after which it is written whole.
"""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from dense_reward_trainer.cli import main
from dense_reward_trainer.runs.run_folder import MetricsLog


def command(signal_number: signal.Signals, at: int | str, *arguments: str) -> list[str]:
    """The command line of this program."""
    return [sys.executable, str(Path(__file__)), signal_number.name, str(at), *arguments]


def send_at(signal_number: signal.Signals, step: int) -> None:
    """Makes the process signal itself after the first line of `step` was written to metrics.jsonl."""
    append = MetricsLog.append

    def append_and_signal(log: MetricsLog, logged_step: int, values: Mapping[str, float | None]) -> None:
        append(log, logged_step, values)
        if logged_step == step:
            signal.raise_signal(signal_number)  # os.kill could interrupt any thread, at a later moment

    MetricsLog.append = append_and_signal  # type: ignore[assignment, method-assign]


def send_after(signal_number: signal.Signals, name: str) -> None:
    """Makes the process signal itself after a file of this name was written whole."""
    replace = Path.replace

    def replace_and_signal(partial: Path, target: Path) -> Path:
        written = replace(partial, target)
        if written.name == name:
            signal.raise_signal(signal_number)
        return written

    Path.replace = replace_and_signal  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    # A shell starts background processes with SIGINT ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number, at = signal.Signals[sys.argv[1]], sys.argv[2]
    if at.isdigit():
        send_at(number, int(at))
    else:
        send_after(number, at)
    sys.exit(main(sys.argv[3:]))
