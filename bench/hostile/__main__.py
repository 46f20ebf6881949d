"""Measures and writes bench/results/hostile.json: `python -m bench.hostile [--only STAGE]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.circumstances import Stages, chosen, measure_stages
from bench.hostile import bodies, checkpoints, secrets, signals, sockets

RESULTS = Path("bench/results/hostile.json")
STAGES: Stages = {
    "bodies": bodies.measure,
    "sockets": sockets.measure,
    "checkpoints": checkpoints.measure,
    "signals": signals.measure,
    "secrets": secrets.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all requested stages are measured and written."""
    names = chosen(STAGES, __doc__, arguments)
    measure_stages(RESULTS, STAGES, names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
