"""The command `dense-reward-train JOB CONFIG [key.sub=value ...]`. It parses everything before any slow import."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from dense_reward.command_line.extras import EXTRA_OF_TRAINER, with_advice

from dense_reward_trainer.commands import PROGRAM, parsed

if TYPE_CHECKING:
    from dense_reward.records import Report


def command() -> NoReturn:
    """The console command: `main` with the arguments of sys.argv, then the end of the process."""
    if "RANK" in os.environ:  # of a launch; elsewhere the import would only delay a help text
        from dense_reward_trainer.runs.processes import exits_with

        exits_with(main)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None, report_error: "Report | None" = None) -> int:
    """Runs one job and returns its exit code. An error that a user can fix is one line on stderr, not a traceback.

    `report_error`: is called with such an error instead.
    """
    with with_advice(PROGRAM, EXTRA_OF_TRAINER):
        options = parsed(arguments)
        from dense_reward_trainer.job_runner import run

        return run(options, report_error)


if __name__ == "__main__":
    command()
