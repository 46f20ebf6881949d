"""The command `dense-reward`: parses the arguments, and imports what they need."""

import sys
from collections.abc import Sequence

from dense_reward.command_line.arguments import PROGRAM, parser
from dense_reward.command_line.extras import EXTRA_OF_SERVICE, with_advice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that a user can fix are lines on stderr, without a traceback."""
    with with_advice(PROGRAM, EXTRA_OF_SERVICE):
        options = parser().parse_args(arguments)
        from dense_reward.command_line.subcommands import run

        return run(options)


if __name__ == "__main__":
    sys.exit(main())
