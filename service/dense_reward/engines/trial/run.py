"""Runs a trial: what a checkpoint makes libraries compute, in a process that is killed if that takes too much."""

import json
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from dense_reward.engines.weight_files import LARGEST_ID
from dense_reward.hashed_files import Stamp

CPU_S = 1.0
"""Seconds of a processor for all that is tried. Ordinary templates take milliseconds."""
MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 1_000_000
"""Of the rendering of one short chat."""
OUT_OF_MEMORY = 3
"""The exit code that says so."""
PATIENCE_S = 120.0
"""Seconds until it is killed, however little of a processor it got."""
TOKENIZER_CPU_S, TOKENIZER_MEMORY_BYTES = 10.0, 2 << 30
"""For reading a tokenizer and a few texts. One of 256,000 tokens takes two seconds and half a gigabyte."""
TOKENS_PER_CHARACTER = 16
"""More of them are no tokenizer's: a character has at most four bytes."""
PLAIN_TEXT = "Name a river: it's 2,850.5 km long.\n\n\tdef f(x): return x**2  # naïve café, 数学 👩‍🔬"
TEXTS = (PLAIN_TEXT, *(part * (2_000 // len(part)) + end for part in ("a", "a ", " ", "0") for end in "!a\n"))
"""What a tokenizer must encode. Most are repetitions, which a bad pattern matches in ways beyond number."""
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
    _try({"templates": templates, "patterns": patterns, "names": names}, CPU_S, MEMORY_BYTES)


@lru_cache(maxsize=64)
def check_tokenizer_by_trial(path: Path, stamp: Stamp) -> None:
    """Raises TrialError if reading a tokenizer.json and encoding short texts is too much; other errors pass here.

    `stamp` changes with the file: what passed is not tried again.
    """
    limits = {"largest_id": LARGEST_ID, "per_character": TOKENS_PER_CHARACTER}
    _try({"tokenizer": {"path": str(path), "texts": TEXTS, **limits}}, TOKENIZER_CPU_S, TOKENIZER_MEMORY_BYTES)


def _try(tried: dict[str, object], cpu_s: float, memory_bytes: int) -> None:
    nothing = {"templates": (), "patterns": (), "names": (), "tokenizer": None}
    task = {**nothing, **tried, "cpu_s": cpu_s, "memory_bytes": memory_bytes, "characters": MAX_CHARACTERS}
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
    if code in (OUT_OF_MEMORY, -signal.SIGSEGV, -signal.SIGABRT):
        much = (
            f"{MAX_CHARACTERS} characters" if tried.get("templates") else f"{TOKENS_PER_CHARACTER} tokens a character"
        )
        raise TrialError(f"it makes more than {much}, or takes more than {memory_bytes >> 20} MB")
    if code < 0:
        raise TrialError(f"it takes more than {cpu_s:g} second{'s' * (cpu_s > 1)} of a processor")
    if code:
        raise RuntimeError(f"{_PROGRAM} ended with code {code}")
