"""`python -m bench.scale`: simulates, and writes bench/results/scale.json and docs/pictures/scale_*.png."""

import json
import sys
from pathlib import Path

from dense_reward_trainer.runs.run_folder import commit

from bench.credit import circumstances
from bench.scale.pictures import draw
from bench.scale.questions import QUESTIONS, assumptions
from bench.scale.reality import Cell, Overload, measured_machine, overload_measured, overload_simulated

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")


def main() -> int:
    """Exit code 0 once all is written."""
    at = commit()  # before its own results change the checkout
    cells: dict[str, Cell] = json.loads((RESULTS / "cpu.json").read_text())["cells"]
    experiment: Overload = json.loads((RESULTS / "reliability.json").read_text())["experiments"]["overload"]
    machine = measured_machine(cells)
    measured = overload_measured(experiment)
    simulated = overload_simulated(experiment["requests_per_s"]["capacity"], machine.jitter)
    beside = {name: {"measured": measured[name], **found} for name, found in simulated.items()}
    print(json.dumps(beside, indent=2), flush=True)
    answers = {}
    for name, ask in QUESTIONS.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        answers[name] = ask(machine)
    draw(PICTURES, answers)
    told = {"assumptions": assumptions(machine), "overload": beside, **answers, **circumstances(), "commit": at}
    (RESULTS / "scale.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
