"""Stage: the output layer's sums over the vocabulary against float64, in torch and in one kernel, and their speed."""

from collections.abc import Callable

import numpy as np
import torch
from dense_reward.engines.kernels.fused_sums import FusedSums, cannot_fuse
from dense_reward.engines.kernels.row_sums import RowSums, TorchSums
from dense_reward.engines.torch.heads import LinearHead, PostProcessing
from dense_reward.records import Wants
from torch import Tensor

from bench.gpu.machine import Machine, Record

WORDS, ROWS, HIDDEN, TILE = 151_936, 4096, 1536, 16_384
ALL = Wants(kl=True, entropy=True)
TOLERANCE_NATS = 2e-5


def stage(machine: Machine, record: Record) -> None:
    """Fails if kl, entropy or log sum exp is off by more than TOLERANCE_NATS."""
    words, rows = (1000, 16) if machine.tiny else (WORDS, ROWS)
    reason = cannot_fuse(machine.device, torch.float32)
    record(fused="yes" if reason is None else f"no: {reason}")
    ways: dict[str, Callable[[], RowSums]] = {"torch": lambda: TorchSums(2, ((0, 1),), ALL)}
    if reason is None:
        ways["fused"] = lambda: FusedSums(2, ((0, 1),), ALL)
    random = torch.Generator(machine.device).manual_seed(0)
    worst = 0.0
    for scale in (1.0, 8.0):
        logits = [scale * torch.randn(rows, words, generator=random, device=machine.device) for _ in range(2)]
        exact = _exact([each[:64].double() for each in logits])
        for name, made in ways.items():
            errors = _errors(_summed(made(), logits), exact)
            record(**{f"largest error in nats, {name}, logits of std {scale:g}": errors})
            worst = max(worst, *errors.values())
    _time(machine, record, ways, rows, words)
    if not worst <= TOLERANCE_NATS:
        raise SystemExit(f"an error of {worst:.2g} nats, at most {TOLERANCE_NATS}")


def _summed(sums: RowSums, logits: list[Tensor]) -> RowSums:
    for start in range(0, logits[0].shape[1], TILE):
        sums.add([each[:, start : start + TILE].contiguous() for each in logits], start)
    return sums


def _exact(logits: list[Tensor]) -> dict[str, Tensor]:
    sft, reference = (torch.log_softmax(each, 1) for each in logits)
    return {
        "log sum exp": logits[0].logsumexp(1),
        "kl": (sft.exp() * (sft - reference)).sum(1),
        "entropy": -(sft.exp() * sft).sum(1),
    }


def _errors(sums: RowSums, exact: dict[str, Tensor]) -> dict[str, float]:
    kl, entropy, *_ = sums.quantities(0)
    found = {"log sum exp": sums.log_totals()[0], "kl": kl, "entropy": entropy}
    return {
        name: float((found[name][: len(values)].double() - values).abs().max())  # type: ignore[index]
        for name, values in exact.items()
    }


def _time(machine: Machine, record: Record, ways: dict[str, Callable[[], RowSums]], rows: int, words: int) -> None:
    """Milliseconds of both heads over all tiles, with the sums and without."""
    weight = torch.randn(words, HIDDEN, device=machine.device).to(torch.bfloat16)
    states = torch.randn(rows, HIDDEN, device=machine.device).to(torch.bfloat16)
    head = LinearHead(weight, None, PostProcessing())
    tiles = [slice(start, min(start + TILE, words)) for start in range(0, words, TILE)]

    def whole(made: Callable[[], RowSums] | None) -> None:
        sums = None if made is None else made()
        for tile in tiles:
            logits = [head.logits(states, tile).float() for _ in range(2)]
            if sums is not None:
                sums.add(logits, tile.start)

    calls = {name: lambda made=made: whole(made) for name, made in {"matmuls alone": None, **ways}.items()}
    seconds = machine.in_turns(calls, rounds=10)
    record(milliseconds={name: 1e3 * value for name, value in seconds.items()}, rows=rows, words=int(np.int64(words)))
