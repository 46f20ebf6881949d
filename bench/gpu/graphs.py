"""Stage: small rows by recorded CUDA graphs and without them: equal scores, and what recording costs."""

import numpy as np
import torch
from dense_reward.engines.kernels.graphs import RowGraphs
from dense_reward.records import Scores, Wants
from numpy.typing import NDArray

from bench.gpu.machine import Machine, Record, rms, trunks_of
from bench.speed.workload import SHAPES, Lengths

BATCHES: dict[str, Lengths] = {
    "128 + 128": ((128, (128,)),),
    "3 + 30": ((3, (30,)),),
    "128 + 8 x 128": ((128, (128,) * 8),),
    "four trees": ((100, (7, 300, 1)), (5, ()), (250, (40, 40)), (1, (600,))),
    "100 short answers": ((200, (9,) * 100),),
    "more keys than a graph takes": ((1000, (16,) * 60),),
}
SHARE_OF_STD = 0.05
"""Largest difference, as a share of the rewards' standard deviation: that of bfloat16 is about 0.02 with this model."""


def stage(machine: Machine, record: Record) -> None:
    """Fails if a graph computes something else."""
    if machine.device.type != "cuda":
        return
    shape = SHAPES["05b"]
    before = torch.cuda.memory_allocated()
    models = [machine.model(shape, seed) for seed in (1, 2)]
    for model in models:  # of random weights the logits are nearly equal
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4)
    loaded = torch.cuda.memory_allocated()
    engine = machine.engine(*models)
    record(weights_mb=(loaded - before) / 1e6, reserved_mb=torch.cuda.memory_reserved() / 1e6)
    record(seconds_to_record=machine.seconds(engine.models[0].record_graphs))
    replayed, worst = 0, 0.0
    states = RowGraphs.states
    for name, lengths in BATCHES.items():
        trunks = trunks_of(lengths, shape.vocab_size)
        calls: list[bool] = []

        def counted(graphs: RowGraphs, *row: object, calls: list[bool] = calls) -> torch.Tensor | None:
            found = states(graphs, *row)  # type: ignore[arg-type]
            calls.append(found is not None)
            return found

        with _replaced(counted):
            found = [_rewards(engine.score(trunks, Wants())) for _ in range(2)]
        with _replaced(lambda *_: None):
            expected = _rewards(engine.score(trunks, Wants()))
        off = rms(found[0] - expected) / float(expected.std())
        record(
            **{
                name: {
                    "by_graph": calls,
                    "rms_over_std": off,
                    "repeated_equal": bool(np.array_equal(found[0], found[1])),
                }
            }
        )
        replayed, worst = replayed + sum(calls), max(worst, off)
    if not replayed or not worst <= SHARE_OF_STD:
        raise SystemExit(f"{replayed} rows by graph; off by {worst:.3g} standard deviations, at most {SHARE_OF_STD}")


class _replaced:  # noqa: N801 - a context manager
    def __init__(self, states: object) -> None:
        self._states = states

    def __enter__(self) -> None:
        self._before = RowGraphs.states
        RowGraphs.states = self._states  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        RowGraphs.states = self._before  # type: ignore[method-assign]


def _rewards(scores: Scores) -> NDArray[np.float64]:
    return np.concatenate(
        [s.sft_logprob_S.astype(np.float64) - s.reference_logprob_S for of_trunk in scores for s in of_trunk]
    )
