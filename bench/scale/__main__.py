"""Simulates, and writes bench/results/scale.json and the pictures and tables of docs/scale.md: `python -m bench.scale`.

`python -m bench.scale page` only writes the tables.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit

from bench.circumstances import circumstances
from bench.scale import page
from bench.scale.pictures import draw
from bench.scale.questions import QUESTIONS, assumptions
from bench.scale.validation import Cell, Overload, measured_machine, overload_measured, overload_simulated

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 after everything is written."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["page"], help="page: only write the tables of docs/scale.md")
    if parser.parse_args(arguments).command is None:
        _simulate()
    page.write()
    return 0


def _simulate() -> None:
    at = commit()  # read first: the results of this run make the checkout dirty
    cells: dict[str, Cell] = json.loads((RESULTS / "cpu.json").read_text())["cells"]
    experiment: Overload = json.loads((RESULTS / "reliability.json").read_text())["experiments"]["overload"]
    machine = measured_machine(cells)
    measured = overload_measured(experiment)
    simulated = overload_simulated(experiment["requests_per_s"]["capacity"], machine.jitter)
    compared = {name: {"measured": measured[name], **found} for name, found in simulated.items()}
    print(json.dumps(compared, indent=2), flush=True)
    answers = {}
    for name, ask in QUESTIONS.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        answers[name] = ask(machine)
    draw(PICTURES, answers)
    record = {"assumptions": assumptions(machine), "overload": compared, **answers, **circumstances(), "commit": at}
    (RESULTS / "scale.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
