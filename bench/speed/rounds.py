"""One round of a cell: everyone on the same ids, one after the other, the matmul peak on both sides of the service."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from bench.speed import memory
from bench.speed.cells import Cell
from bench.speed.contestants import Field, Run, Variant, variants
from bench.speed.ledger import Ledger
from bench.speed.processes import NotMeasuredError
from bench.speed.protocol import Logprobs
from bench.speed.record import Peak, Round, Rounding, Timed
from bench.speed.service import ServiceRun
from bench.speed.workloads import Workload, write

Say = Callable[[str], None]
# Root mean square of the difference to the service's rewards, in nats, beyond which a run fails. A token out of place
# is wrong by about 1.
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.1}
WARM_SEQUENCES = 8
MEMORY_CELLS = ("b_40m", "b_05b", "b_15b", "b_7b")


class DisagreementError(Exception):
    """A contestant computed something else than the service: its time says nothing."""


def measure(cell: Cell, rounds: int, field: Field, ledger: Ledger, say: Say) -> list[Round]:
    """All rounds, those of the ledger as they are. Raises DisagreementError."""
    measured: list[Round] = []
    for round_ in range(rounds):
        name = f"{cell.name} round {round_ + 1} of {rounds}"
        known = ledger.get(cell.name, round_)
        if known is None:
            say(name)
            measured.append(_round(cell, round_, measured, field, say))
            ledger.put(cell.name, round_, measured[-1].model_dump(mode="json"))
        else:
            say(f"{name}: measured before")
            measured.append(Round.model_validate(known))
    return measured


def _round(cell: Cell, round_: int, before: Sequence[Round], field: Field, say: Say) -> Round:
    """Whoever comes first in one round comes last in the next: none always follows the same neighbour."""
    workload = cell.workload(round_)
    file = write(workload, field.stage.folder / "workload.json")
    others = _kept(variants(cell.sequences), before) if cell.everyone else []
    if others and cell.name not in field.warmed:
        _warm(workload, others, field)
        field.warmed.add(cell.name)
    order: list[Variant | None] = [None, *others]
    start = round_ % len(order)
    runs, missing = dict[str, Run](), dict[str, str]()
    for variant in order[start:] + order[:start]:
        if variant is None:
            service, peaks, extra_mb = _service(cell, workload, field)
            say(f"  service {sum(service.latencies_s):.2f} s, peak {peaks[0].flops_per_s / 1e9:.0f} GFLOP/s")
            continue
        try:
            runs[variant.name] = field.run(variant, file)
            say(f"  {variant.name} {sum(runs[variant.name].latencies_s):.2f} s")
        except NotMeasuredError as error:
            missing[variant.name] = str(error)
            say(f"  {variant.name} not measured: {error}")
    return Round(
        service=Timed(latencies_s=tuple(service.latencies_s), compute_s=service.compute_s),
        peaks=peaks,
        others={name: compared(name, run, service, field.stage.dtype) for name, run in runs.items()},
        not_measured=missing,
        extra_mb=extra_mb,
        reward_std_nats=float(service.rewards_N.std()),
    )


def _service(cell: Cell, workload: Workload, field: Field) -> tuple[ServiceRun, tuple[Peak, Peak], float | None]:
    held_mb, remembers = field.held_mb, cell.name in MEMORY_CELLS
    before = field.peak()
    with memory.watched(field.service.process.pid, field.stage.device) if remembers else nullcontext() as watched:
        run = field.run_service(workload)
    peaks = Peak.model_validate(before), Peak.model_validate(field.peak())
    return run, peaks, None if watched is None else watched.peak_mb - held_mb


def _kept(found: Sequence[Variant], before: Sequence[Round]) -> list[Variant]:
    """After the first round, of each contestant the variant that was fastest in it, and those that could not run."""
    if not before:
        return list(found)
    seconds = {name: timed.seconds for name, timed in before[0].others.items()}
    fastest: dict[str, Variant] = {}
    for variant in sorted(found, key=lambda v: seconds.get(v.name, float("inf"))):
        fastest.setdefault(variant.contestant, variant)
    return [variant for variant in found if variant in fastest.values()]


def _warm(workload: Workload, others: Sequence[Variant], field: Field) -> None:
    """One request of a few sequences for everyone, whose time is not taken."""
    first = workload.items[0]
    items = workload.items[:1] if len(first.response_ids) > 1 else workload.items[:WARM_SEQUENCES]
    part = replace(workload, items=items)
    file = write(part, field.stage.folder / "warm.json")
    field.run_service(part)
    for contestant in {variant.contestant: variant for variant in others}.values():
        try:
            field.run(contestant, file)
        except NotMeasuredError:
            continue


def compared(name: str, run: Run, service: ServiceRun, dtype: str) -> Timed:
    """Raises DisagreementError where its rewards are not the service's."""
    rms = rms_of(run.rewards_N - service.rewards_N)
    if not rms <= TOLERANCE_NATS[dtype]:
        raise DisagreementError(
            f"the rewards of {name} differ from the service's by {rms:.3g} nats (rms, at most {TOLERANCE_NATS[dtype]}"
            "): one of them computes something else"
        )
    return Timed(latencies_s=tuple(run.latencies_s), rms_nats=rms)


def rounding(cell: Cell, field: Field) -> Rounding:
    """How far the service in bfloat16 and transformers in bfloat16 are from transformers in float32."""
    workload = cell.workload(0)
    file = write(workload, field.stage.folder / "workload.json")
    exact_2N = field.transformers_logprobs("float32", file)
    transformers_2N = field.transformers_logprobs("bfloat16", file)
    with field.stage.in_dtype("bfloat16").service(field.models) as service:
        served_2N = service.logprobs(workload)
    return Rounding(
        tokens=exact_2N.shape[1],
        service_rms_nats=rms_of(served_2N - exact_2N),
        transformers_rms_nats=rms_of(transformers_2N - exact_2N),
    )


def rms_of(differences: Logprobs) -> float:
    return float(np.sqrt(np.mean(np.square(differences, dtype=np.float64))))
