"""Runs a job's command, and signals its own process when it logs a step, so that runs end at the same point.

`python killed_job.py SIGNAL STEP JOB CONFIG [key.sub=value ...]`.
"""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from dense_reward_trainer.cli import main
from dense_reward_trainer.runs.run_folder import MetricsLog


def command(signal_number: signal.Signals, step: int, *arguments: str) -> list[str]:
    """The command line of this program."""
    return [sys.executable, str(Path(__file__)), signal_number.name, str(step), *arguments]


def send_at(signal_number: signal.Signals, step: int) -> None:
    """Makes the process signal itself after the first line of `step` was written to metrics.jsonl."""
    append = MetricsLog.append

    def append_and_signal(log: MetricsLog, logged_step: int, values: Mapping[str, float | None]) -> None:
        append(log, logged_step, values)
        if logged_step == step:
            signal.raise_signal(signal_number)  # os.kill could interrupt any thread, at a later moment

    MetricsLog.append = append_and_signal  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    # A shell starts background processes with SIGINT ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    send_at(signal.Signals[sys.argv[1]], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
