"""Speed benchmark: `python -m bench.speed cpu | gpu | report | vllm_settings | lengths`, from the repository's root."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.speed import report
from bench.speed.contestants import Launcher
from bench.speed.runner import compare_vllm_settings, run
from bench.speed.workload import Cell, Target, cells_of

DEVICES: dict[Target, str] = {"cpu": "cpu", "gpu": "cuda"}
VLLM_FOLDERS: dict[Target, Path] = {"cpu": Path(".venv-vllm"), "gpu": Path(".venv-vllm-gpu")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once everything is measured or written."""
    signal.signal(signal.SIGTERM, _stop)  # exit normally, which ends the contestants too
    options = _parser().parse_args(arguments)
    match options.command:
        case "report":
            report.write()
        case "vllm_settings":
            compare_vllm_settings(options.vllm)
        case "lengths":
            from bench.speed.inputs import make_lengths  # noqa: PLC0415 # torch costs seconds and memory

            make_lengths(options.file)
        case target:
            _measure(target, options)
    return 0


def _measure(target: Target, options: argparse.Namespace) -> None:
    launcher = Launcher(DEVICES[target], options.dtype, options.threads, options.vllm or VLLM_FOLDERS[target])
    run(target, chosen(cells_of(target), options.only), launcher, rounds=options.rounds, fresh=options.fresh)


def chosen(cells: Sequence[Cell], only: str | None) -> Sequence[Cell]:
    """Returns the named cells in the order of measuring. Exits if a name is unknown."""
    if only is None:
        return cells
    names = only.split(",")
    unknown = sorted(set(names) - {cell.name for cell in cells})
    if unknown:
        sys.exit(f"unknown cells: {', '.join(unknown)}; choose from {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if cell.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for target in DEVICES:
        _add_measuring(commands.add_parser(target, help=f"measure, and write bench/results/{target}.json"))
    commands.add_parser("report", help="write the tables of docs/benchmarks.md and the picture from bench/results")
    settings = commands.add_parser("vllm_settings", help="compare vLLM's settings on a CPU")
    settings.add_argument("vllm", type=Path, nargs="?", default=VLLM_FOLDERS["cpu"], help="environment with vLLM")
    making = commands.add_parser("lengths", help="write bench/speed/gsm8k_lengths.json")
    making.add_argument("file", type=Path, help="GSM8K's training file, JSON lines of question and answer")
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of all contestants")
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument("--only", metavar="CELL,...", help="some cells; the file keeps the others of the same commit")
    parser.add_argument("--rounds", type=int, help="rounds of every cell, instead of its own number")
    parser.add_argument("--fresh", action="store_true", help="ignore rounds of an interrupted run")
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="environment with vLLM")


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
