"""Runs the benchmark: cells by shape, their rounds, a ledger of finished rounds, and the results file."""

import hashlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward_trainer.runs.run_folder import versions
from pydantic import JsonValue

from bench.circumstances import processor
from bench.speed.contestants import Contestants, Launcher, Run, ServiceRun, Variant, variants
from bench.speed.conversations import conversations
from bench.speed.processes import Logprobs, NotMeasuredError, Worker, watched
from bench.speed.results import (
    Circumstances,
    Measured,
    Peak,
    Results,
    Round,
    Rounding,
    Timed,
    figures,
    read_results,
    write_results,
)
from bench.speed.workload import Cell, Target, Workload, cells_of, write

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MEASURED = ("service", "bench/speed")
"""Only changes here invalidate measurements."""
ROUNDING_CELL = "error_40m"
CONVERSATIONS_CELL = "conversations_40m"
MEMORY_CELLS = ("b_40m", "b_05b", "b_15b", "b_7b")
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.1}
"""A run fails if rewards differ from the service's by more nats (root mean square). A misplaced token differs by
about 1."""
WARM_SEQUENCES = 8
VLLM_ROUNDS = 6  # the first is not counted
VLLM_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "in one process": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    "its own choice of cores": {"VLLM_CPU_OMP_THREADS_BIND": "auto"},
    "its own choice of OpenMP": {"LD_PRELOAD": ""},
}


class DisagreementError(Exception):
    """A contestant computed something other than the service, so its time means nothing."""


@dataclass(slots=True)
class Progress:
    """Prints lines with the time since the start, in minutes and seconds."""

    started_s: float = field(default_factory=time.monotonic)

    def __call__(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started_s), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {line}", flush=True)


@dataclass(slots=True)
class Ledger:
    """Records of finished rounds, so that an interrupted run continues: JSON lines with the commit.

    `fresh`: ignores what the file holds.
    """

    file: Path
    commit: str
    fresh: bool
    _records: dict[tuple[str, int], Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads the file, and removes a last line that a kill left incomplete."""
        if not self.file.exists():
            return
        whole = self.file.read_text(encoding="utf-8").rpartition("\n")[:2]
        write_whole(self.file, "".join(whole).encode())
        known = [] if self.fresh else [json.loads(line) for line in whole[0].splitlines()]
        self._records = {
            (line["cell"], line["round"]): line["record"] for line in known if line["commit"] == self.commit
        }

    def get(self, cell: str, round_: int) -> Mapping[str, object] | None:
        return self._records.get((cell, round_))

    def put(self, cell: str, round_: int, record: Mapping[str, object]) -> None:
        self._records[cell, round_] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = {"commit": self.commit, "cell": cell, "round": round_, "record": record}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measured_commit() -> str:
    """Returns the last commit that changed MEASURED, with a hash of uncommitted changes to it, if any.

    Where there is no git folder, the environment names it: MEASURED_COMMIT.
    """
    stated = os.environ.get("MEASURED_COMMIT")
    if stated:
        return stated
    commit = _git("log", "-1", "--format=%H", "--", *MEASURED).strip()
    changed = _git("diff", "HEAD", "--", *MEASURED)
    new = _git("ls-files", "--others", "--exclude-standard", "--", *MEASURED).split()
    if not changed and not new:
        return commit
    digest = hashlib.sha256(changed.encode())
    for name in new:
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return f"{commit}-dirty-{digest.hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run(target: Target, cells: Sequence[Cell], launcher: Launcher, *, rounds: int | None, fresh: bool) -> Path:
    """Measures the cells and merges them into the results file if that is of the same commit, dtype and processor."""
    report = Progress()
    with launcher.peak() as worker:  # it resolves dtype auto for this machine
        facts = worker.facts
    launcher = launcher.in_dtype(str(facts["dtype"]))
    name = processor() if launcher.device == "cpu" else str(facts["kernels"])
    here = Circumstances(commit=measured_commit(), dtype=launcher.dtype, device=launcher.device, processor=name)
    report(f"{here.dtype} on {here.processor}, commit {here.commit}")
    file = RESULTS / f"{target}.json"
    results = _results_so_far(file, here, {"threads": launcher.threads, "kernels": str(facts["kernels"])}, report)
    ledger = Ledger(launcher.folder / f"{launcher.dtype}.jsonl", here.commit, fresh)
    for shape_name, group in groupby(cells, key=lambda cell: cell.shape_name):
        report(f"{shape_name}: making missing checkpoints")
        with Contestants(launcher, shape_name) as contestants:
            for cell in group:
                results = _with(cell, results, contestants, ledger, report, rounds=rounds or cell.rounds)
                write_results(file, figures(target, results), results)
    report(f"wrote {file.relative_to(ROOT)}")
    return file


def _results_so_far(file: Path, here: Circumstances, facts: dict[str, JsonValue], report: Progress) -> Results:
    """Results of the file, without its cells if they were measured under other circumstances."""
    settings = facts | {"versions": {**versions()}}
    known = read_results(file)
    if known is None:
        return Results(circumstances=here, settings=settings)
    if known.circumstances != here:
        report(f"{file.name} holds figures of {known.circumstances}: the new file omits them")
        return Results(circumstances=here, settings=settings)
    report(f"{file.name} keeps its other cells of this commit: {', '.join(known.cells) or 'none'}")
    return known.model_copy(update={"settings": known.settings | settings})


def _with(
    cell: Cell, results: Results, contestants: Contestants, ledger: Ledger, report: Progress, *, rounds: int
) -> Results:
    """Returns the results with this cell measured."""
    if cell.name == ROUNDING_CELL:
        return results.model_copy(update={"rounding": _rounding(cell, contestants, ledger, report)})
    if cell.name == CONVERSATIONS_CELL:
        with contestants.service.awake():
            found = conversations(contestants.service, cell.shape.vocab_size)
        report(f"{cell.name} done: {found.share:.3f} times the distinct tokens")
        return results.model_copy(update={"conversations": found})
    measured = Measured.of(cell, measure(cell, rounds, contestants, ledger, report))
    report(f"{cell.name} done: {measured.peak_share():.3f} of the matmul peak")
    facts = {name: dict(found) for name, found in contestants.facts.items()}
    return results.model_copy(
        update={"cells": results.cells | {cell.name: measured}, "settings": results.settings | facts}
    )


def _rounding(cell: Cell, contestants: Contestants, ledger: Ledger, report: Progress) -> Rounding:
    known = ledger.get(cell.name, 0)
    if known is not None:
        report(f"{cell.name}: measured earlier")
        return Rounding.model_validate(known)
    report(f"{cell.name}: bfloat16 and float32, not timed")
    measured = rounding(cell, contestants)
    ledger.put(cell.name, 0, measured.model_dump(mode="json"))
    return measured


def measure(cell: Cell, rounds: int, contestants: Contestants, ledger: Ledger, report: Progress) -> list[Round]:
    """Returns all rounds of a cell; measures those that the ledger does not hold. Raises DisagreementError."""
    measured: list[Round] = []
    for round_ in range(rounds):
        name = f"{cell.name} round {round_ + 1} of {rounds}"
        known = ledger.get(cell.name, round_)
        if known is None:
            report(name)
            measured.append(_round(cell, round_, measured, contestants, report))
            ledger.put(cell.name, round_, measured[-1].model_dump(mode="json"))
        else:
            report(f"{name}: measured earlier")
            measured.append(Round.model_validate(known))
    return measured


def _round(cell: Cell, round_: int, before: Sequence[Round], contestants: Contestants, report: Progress) -> Round:
    """Measures all contestants on the same ids. Each round starts with a different one: neighbours change."""
    workload = cell.workload(round_)
    file = write(workload, contestants.launcher.folder / "workload.json")
    others = _kept(variants(cell.sequences), before) if cell.compared else []
    if others and cell.name not in contestants.warmed:
        _warm(workload, others, contestants)
        contestants.warmed.add(cell.name)
    order: list[Variant | None] = [None, *others]  # None is the service
    start = round_ % len(order)
    runs, missing = dict[str, Run](), dict[str, str]()
    for variant in order[start:] + order[:start]:
        if variant is None:
            service, peaks, extra_mb = _service(cell, workload, contestants)
            report(f"  service {sum(service.latencies_s):.2f} s, peak {peaks[0].flops_per_s / 1e9:.0f} GFLOP/s")
            continue
        try:
            runs[variant.name] = contestants.run(variant, file)
            report(f"  {variant.name} {sum(runs[variant.name].latencies_s):.2f} s")
        except NotMeasuredError as error:
            missing[variant.name] = str(error)
            report(f"  {variant.name} not measured: {error}")
    return Round(
        service=Timed(latencies_s=tuple(service.latencies_s), compute_s=service.compute_s),
        peaks=peaks,
        others={name: compared(name, run, service, contestants.launcher.dtype) for name, run in runs.items()},
        not_measured=missing,
        extra_mb=extra_mb,
        reward_std_nats=float(service.rewards_N.std()),
    )


def _service(
    cell: Cell, workload: Workload, contestants: Contestants
) -> tuple[ServiceRun, tuple[Peak, Peak], float | None]:
    """The service's run between two measurements of the peak, and in memory cells its extra memory in megabytes."""
    held_mb, measures_memory = contestants.held_mb, cell.name in MEMORY_CELLS
    before = contestants.peak()
    pid, device = contestants.service.process.pid, contestants.launcher.device
    with watched(pid, device) if measures_memory else nullcontext() as memory:
        run = contestants.run_service(workload)
    peaks = Peak.model_validate(before), Peak.model_validate(contestants.peak())
    return run, peaks, None if memory is None else memory.mb - held_mb


def _kept(found: Sequence[Variant], before: Sequence[Round]) -> list[Variant]:
    """All variants in the first round; later, the variant of each contestant that was fastest in the first round.

    A contestant that could not be measured also keeps one variant.
    """
    if not before:
        return list(found)
    seconds = {name: timed.seconds for name, timed in before[0].others.items()}
    fastest: dict[str, Variant] = {}
    for variant in sorted(found, key=lambda v: seconds.get(v.name, float("inf"))):
        fastest.setdefault(variant.contestant, variant)
    return [variant for variant in found if variant in fastest.values()]


def _warm(workload: Workload, others: Sequence[Variant], contestants: Contestants) -> None:
    """Sends a request of a few sequences, which is not timed, to each contestant."""
    first = workload.items[0]
    items = workload.items[:1] if len(first.response_ids) > 1 else workload.items[:WARM_SEQUENCES]
    part = replace(workload, items=items)
    file = write(part, contestants.launcher.folder / "warm.json")
    contestants.run_service(part)
    for variant in {variant.contestant: variant for variant in others}.values():
        try:
            contestants.run(variant, file)
        except NotMeasuredError:
            continue


def compared(name: str, run: Run, service: ServiceRun, dtype: str) -> Timed:
    """Returns a contestant's times. Raises DisagreementError if its rewards are not the service's."""
    rms = rms_of(run.rewards_N - service.rewards_N)
    if not rms <= TOLERANCE_NATS[dtype]:
        raise DisagreementError(
            f"the rewards of {name} differ from the service's by {rms:.3g} nats (rms, at most {TOLERANCE_NATS[dtype]}"
            "): one of them computes something else"
        )
    return Timed(latencies_s=tuple(run.latencies_s), rms_nats=rms)


def rounding(cell: Cell, contestants: Contestants) -> Rounding:
    """Error of the service and of transformers, both in bfloat16, against transformers in float32."""
    workload, launcher = cell.workload(0), contestants.launcher
    file = write(workload, launcher.folder / "workload.json")
    exact_2N = contestants.transformers_logprobs("float32", file)
    transformers_2N = contestants.transformers_logprobs("bfloat16", file)
    with launcher.in_dtype("bfloat16").service(contestants.models) as service:
        service_2N = service.logprobs(workload)
    return Rounding(
        tokens=exact_2N.shape[1],
        service_rms_nats=rms_of(service_2N - exact_2N),
        transformers_rms_nats=rms_of(transformers_2N - exact_2N),
    )


def rms_of(differences: Logprobs) -> float:
    return float(np.sqrt(np.mean(np.square(differences, dtype=np.float64))))


def compare_vllm_settings(vllm_folder: Path) -> None:
    """Prints seconds of vLLM under several settings, one checkpoint, on (a) at 40M. Measures in turns."""
    launcher = Launcher("cpu", "float32", 0, vllm_folder)
    models = launcher.pair("40m")
    with ExitStack() as stack:
        workers = {
            "as in the benchmark": stack.enter_context(launcher.vllm(models, "sft")),
            "compiled": stack.enter_context(launcher.vllm(models, "sft", "--compiled")),
        }
        for name, environment in VLLM_ENVIRONMENTS.items():
            workers[name] = stack.enter_context(launcher.vllm(models, "sft", **environment))
        for name, seconds in _in_turns(launcher, workers).items():
            print(f"{name}: median {statistics.median(seconds[1:]):.2f} s, least {min(seconds[1:]):.2f} s")


def _in_turns(launcher: Launcher, workers: Mapping[str, Worker]) -> dict[str, list[float]]:
    """Seconds of each worker in every round."""
    cell = next(cell for cell in cells_of("cpu") if cell.name == "a_40m")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for round_ in range(VLLM_ROUNDS):
        file = write(cell.workload(round_), launcher.folder / "workload.json")
        for name, worker in workers.items():
            with worker.awake():
                answer = worker.ask({"workload": str(file), "out": str(launcher.out), "method": "", "batch": 0})
            seconds[name].append(sum(answer["latencies_s"]))
        print(f"round {round_}: { {name: round(found[-1], 2) for name, found in seconds.items()} }", flush=True)
    return seconds
