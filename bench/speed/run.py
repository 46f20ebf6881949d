"""A whole run: cells by shape, their rounds, and the results file after each of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from dense_reward_trainer.runs.run_folder import versions
from pydantic import JsonValue

from bench.credit import processor
from bench.speed.cells import Cell, Target
from bench.speed.contestants import Field
from bench.speed.ledger import ROOT, Ledger, measured_commit
from bench.speed.outcome import figures
from bench.speed.record import Circumstances, Measured, Results, Rounding, read_results, write_results
from bench.speed.rounds import measure, rounding
from bench.speed.stage import Stage

RESULTS = ROOT / "bench" / "results"
ROUNDING_CELL = "error_40m"


@dataclass(slots=True)
class Progress:
    """Lines with the time since the start, minutes and seconds."""

    started_s: float = field(default_factory=time.monotonic)

    def __call__(self, words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started_s), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {words}", flush=True)


def run(target: Target, cells: Sequence[Cell], stage: Stage, *, rounds: int | None, fresh: bool) -> Path:
    """Measure the cells, and merge them into what the file holds of the same commit, dtype and processor."""
    say = Progress()
    with stage.peak() as worker:  # it knows what auto means here
        facts = worker.facts
    stage = stage.in_dtype(str(facts["dtype"]))
    name = processor() if stage.device == "cpu" else str(facts["kernels"])
    here = Circumstances(commit=measured_commit(), dtype=stage.dtype, device=stage.device, processor=name)
    say(f"{here.dtype} on {here.processor}, commit {here.commit}")
    file = RESULTS / f"{target}.json"
    results = _taken_up(file, here, {"threads": stage.threads, "kernels": str(facts["kernels"])}, say)
    ledger = Ledger(stage.folder / f"{stage.dtype}.jsonl", here.commit, fresh)
    for shape_name, group in groupby(cells, key=lambda cell: cell.shape_name):
        say(f"{shape_name}: making its checkpoints where they are not there yet")
        with Field(stage, shape_name) as everyone:
            for cell in group:
                results = _with(cell, results, everyone, ledger, say, rounds=rounds or cell.rounds)
                write_results(file, figures(target, results), results)
    say(f"written: {file.relative_to(ROOT)}")
    return file


def _taken_up(file: Path, here: Circumstances, facts: dict[str, JsonValue], say: Progress) -> Results:
    """The results so far, without cells where they were measured under other circumstances."""
    settings = facts | {"versions": {**versions()}}
    known = read_results(file)
    if known is None:
        return Results(circumstances=here, settings=settings)
    if known.circumstances != here:
        say(f"{file.name} holds figures of {known.circumstances}: they are left out of the new file")
        return Results(circumstances=here, settings=settings)
    say(f"{file.name} keeps its other cells of this commit: {', '.join(known.cells) or 'none'}")
    return known.model_copy(update={"settings": known.settings | settings})


def _with(cell: Cell, results: Results, everyone: Field, ledger: Ledger, say: Progress, *, rounds: int) -> Results:
    if cell.name == ROUNDING_CELL:
        return results.model_copy(update={"rounding": _rounding(cell, everyone, ledger, say)})
    measured = Measured.of(cell, measure(cell, rounds, everyone, ledger, say))
    say(f"{cell.name} done: {measured.peak_share():.3f} of the matmul peak")
    told = {name: dict(facts) for name, facts in everyone.facts.items()}
    return results.model_copy(
        update={"cells": results.cells | {cell.name: measured}, "settings": results.settings | told}
    )


def _rounding(cell: Cell, everyone: Field, ledger: Ledger, say: Progress) -> Rounding:
    known = ledger.get(cell.name, 0)
    if known is not None:
        say(f"{cell.name}: measured before")
        return Rounding.model_validate(known)
    say(f"{cell.name}: bfloat16 and float32, not timed")
    measured = rounding(cell, everyone)
    ledger.put(cell.name, 0, measured.model_dump(mode="json"))
    return measured
