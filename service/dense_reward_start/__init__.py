"""The entry of the command `dense-reward`: handles SIGTERM before the slow imports, then runs the command line.

A package of its own, because importing `dense_reward` takes a second. Process 1 of a container ignores signals that it
does not handle: a signal of its first seconds would be lost, and the container killed only at the end of its grace.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable


def main() -> int:
    """Runs the command of sys.argv and returns its exit code.

    Until the command handles it, SIGTERM ends the process: `serve` with code 0, because it has admitted no request.
    """
    code = 0 if sys.argv[1:2] == ["serve"] else 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    command: Callable[[], int] = importlib.import_module("dense_reward.cli").main
    return command()
