"""`python -m bench.speed cpu`, `... gpu`, `... report` and `... lengths FILE`, from the repository's root."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.speed import lengths, report
from bench.speed.cells import Cell, Target, cells_of
from bench.speed.run import run
from bench.speed.stage import Stage

DEVICES: dict[Target, str] = {"cpu": "cpu", "gpu": "cuda"}
VLLM_FOLDERS: dict[Target, str] = {"cpu": ".venv-vllm", "gpu": ".venv-vllm-gpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 once all that was asked for is measured or written."""
    signal.signal(signal.SIGTERM, _stop)  # so that contestants are ended too
    options = _parser().parse_args(arguments)
    if options.command == "report":
        report.write()
    elif options.command == "lengths":
        lengths.make(options.file)
    else:
        _measure(options.command, options)
    return 0


def _measure(target: Target, options: argparse.Namespace) -> None:
    stage = Stage(DEVICES[target], options.dtype, options.threads, options.vllm or Path(VLLM_FOLDERS[target]))
    run(target, chosen(cells_of(target), options.only), stage, rounds=options.rounds, fresh=options.fresh)


def chosen(cells: Sequence[Cell], only: str | None) -> Sequence[Cell]:
    """Those that are named, in the order of measuring. Exits for a name that there is none of."""
    if only is None:
        return cells
    names = only.split(",")
    unknown = sorted(set(names) - {cell.name for cell in cells})
    if unknown:
        sys.exit(f"no cell {', '.join(unknown)}: there are {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if cell.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for target in DEVICES:
        _add_measuring(commands.add_parser(target, help=f"measure, and write bench/results/{target}.json"))
    commands.add_parser("report", help="write docs/benchmarks.md's tables and the picture from bench/results")
    making = commands.add_parser("lengths", help="make gsm8k_lengths.json anew")
    making.add_argument("file", type=Path, help="GSM8K's training file, JSON lines of question and answer")
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of all contestants")
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument("--only", metavar="CELL,...", help="some cells; the file keeps the others of the same commit")
    parser.add_argument("--rounds", type=int, help="rounds of every cell, instead of its own number")
    parser.add_argument("--fresh", action="store_true", help="measure also what an interrupted run has measured")
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="environment that holds vLLM")


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
