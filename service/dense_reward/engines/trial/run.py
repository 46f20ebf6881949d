"""Runs a trial: chat templates and patterns of a checkpoint, in a process that is killed if they take too much."""

import json
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

CPU_S = 1.0
"""Seconds of a processor for all that is tried. Ordinary templates take milliseconds."""
MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 1_000_000
"""Of the rendering of one short chat."""
OUT_OF_MEMORY = 3
"""The exit code that says so."""
PATIENCE_S = 120.0
"""Seconds until it is killed, however little of a processor it got."""
_PROGRAM = Path(__file__).with_name("program.py")


class TrialError(Exception):
    """Why something is too much to be computed here, in words."""


@lru_cache(maxsize=64)
def check_by_trial(
    *, templates: tuple[str, ...] = (), patterns: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> None:
    """Raises TrialError if rendering the templates, or matching the patterns with the names, is too much.

    What fails otherwise passes here: it fails again, with its reason, where it is used. What passed is not tried again.
    """
    task = {
        **{"templates": templates, "patterns": patterns, "names": names},
        **{"cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES, "characters": MAX_CHARACTERS},
    }
    try:
        code = subprocess.run(
            [sys.executable, "-P", str(_PROGRAM)],
            input=json.dumps(task).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_S,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        raise TrialError(f"it did not end within {PATIENCE_S:.0f} seconds") from None
    if code in (OUT_OF_MEMORY, -signal.SIGSEGV):
        raise TrialError(f"it makes more than {MAX_CHARACTERS} characters, or takes more than {MEMORY_BYTES >> 20} MB")
    if code < 0:
        raise TrialError(f"it takes more than {CPU_S:g} second of a processor")
    if code:
        raise RuntimeError(f"{_PROGRAM} ended with code {code}")
