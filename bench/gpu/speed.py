"""Stages: speed of the engine alone, as a share of the GPU's own matmuls, beside transformers, and of its parts."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from unittest.mock import patch

import torch
from dense_reward.engines.kernels.graphs import RowGraphs
from dense_reward.engines.torch import feedforward, heads, logprobs
from dense_reward.engines.torch import model as model_module
from dense_reward.engines.torch.pair import PairEngine
from dense_reward.records import Trunk, Wants
from transformers import PreTrainedModel

from bench.gpu.machine import Machine, Record, trunks_of, with_equal_weights
from bench.speed.worker_transformers import Sequences, best, plain
from bench.speed.workload import SHAPES, Lengths, Shape, flops_of, gsm8k_lengths, same_lengths

BATCHES: dict[str, Lengths] = {
    "a: 8 x (128 + 8 x 128)": same_lengths(8, 8, 128, 128),
    "a: 1 x (128 + 8 x 128)": same_lengths(1, 8, 128, 128),
    "b: 1 x (512 + 8 x 1024)": same_lengths(1, 8, 512, 1024),
    "c: 32 solutions of GSM8K": gsm8k_lengths(),
    "d: 1 x (128 + 128)": same_lengths(1, 1, 128, 128),
}
TRANSFORMERS_BATCH = 32
ROUNDS = 11
Way = Callable[[PreTrainedModel, Sequences, int], object]


def speed_15b(machine: Machine, record: Record) -> None:
    """1.5B, beside transformers as people write it and at its best."""
    _speed(machine, record, (SHAPES["15b"], SHAPES["15b"]))


def speed_7b(machine: Machine, record: Record) -> None:
    """7B, likewise."""
    _speed(machine, record, (SHAPES["7b"], SHAPES["7b"]))


def unequal(machine: Machine, record: Record) -> None:
    """A reference of a third of the size."""
    _speed(machine, record, (SHAPES["15b"], SHAPES["05b"]), compared=False)


def _speed(machine: Machine, record: Record, shapes: tuple[Shape, Shape], *, compared: bool = True) -> None:
    models = [machine.model(shape, seed) for seed, shape in enumerate(shapes)]
    theirs = [with_equal_weights(model) for model in models]
    code = sys.modules[type(models[0]).__module__]
    rotate = code.apply_rotary_pos_emb  # the engine replaces it for every model of the class
    engine = machine.engine(*models)
    peak = machine.matmul_flops_per_s()
    record(matmul_tflops=peak / 1e12)
    for name, real_lengths in BATCHES.items():
        lengths = machine.lengths(real_lengths)
        trunks = trunks_of(lengths, machine.shape(shapes[0]).vocab_size)
        calls: dict[str, Callable[[], object]] = {
            "reward": lambda trunks=trunks: engine.score(trunks, Wants()),  # type: ignore[misc]
            "kl and entropy": lambda trunks=trunks: engine.score(trunks, Wants(kl=True, entropy=True)),  # type: ignore[misc]
        }
        if compared:
            sequences = _sequences(trunks)
            for way in (plain, best):
                calls[f"transformers {way.__name__}"] = partial(_theirs, way, theirs, sequences, code, rotate)
        seconds = machine.in_turns(calls, rounds=ROUNDS)
        flops = sum(flops_of(machine.shape(shape), lengths) / 2 for shape in shapes)
        record(
            **{
                name: {
                    "milliseconds": {way: 1e3 * value for way, value in seconds.items()},
                    "share_of_matmul": flops / seconds["reward"] / peak,
                    "tflop": flops / 1e12,
                }
            }
        )


def _theirs(
    way: Way, models: list[PreTrainedModel], sequences: Sequences, code: ModuleType, rotate: Callable[..., object]
) -> None:
    with patch.object(code, "apply_rotary_pos_emb", rotate):
        for model in models:
            way(model, sequences, TRANSFORMERS_BATCH)


def _sequences(trunks: list[Trunk]) -> Sequences:
    return [
        ([*map(int, trunk.prompt_P), *map(int, branch.ids_T)], len(trunk.prompt_P))
        for trunk in trunks
        for branch in trunk.branches
    ]


def variants(machine: Machine, record: Record) -> None:
    """Each part of the engine switched off, in turns, at 1.5B."""
    shape = SHAPES["15b"]
    plain = [machine.model(shape, seed) for seed in (1, 2)]
    with patch.object(model_module, "fuse_layers", lambda _: ()):
        unfused = machine.engine(*[with_equal_weights(model) for model in plain])
    trunks = {
        name: trunks_of(machine.lengths(lengths), unfused.models[0].vocab_size) for name, lengths in BATCHES.items()
    }
    # The fused rotation replaces a function of transformers: measure without it before it is there.
    seconds = {
        name: machine.in_turns({"layers not fused": _score(unfused, trunks[name])}, rounds=ROUNDS) for name in BATCHES
    }
    engine = machine.engine(*plain)
    record(fused=list(engine.models[0].fused))
    for name, of_batch in seconds.items():
        calls = {
            "as it is": _score(engine, trunks[name]),
            "no graphs": _score(engine, trunks[name], lambda: patch.object(RowGraphs, "states", lambda *_: None)),
            "sums in torch": _score(
                engine, trunks[name], lambda: patch.object(logprobs, "cannot_fuse", lambda *_: "off")
            ),
            "feed-forward in parts of 2048 rows": _score(
                engine, trunks[name], lambda: patch.object(feedforward, "GPU_ROWS", feedforward.ROWS)
            ),
            "logits rounded to bfloat16": _score(engine, trunks[name], lambda: patch.object(heads, "SHORT", ())),
            "tiles of 8192 x 8192": _score(
                engine, trunks[name], lambda: patch.object(logprobs, "CUDA_TILING", logprobs.Tiling(8192, 8192))
            ),
        }
        found = of_batch | machine.in_turns(calls, rounds=ROUNDS)
        record(**{name: {way: 1e3 * value for way, value in found.items()}})


def _score(
    engine: PairEngine, trunks: list[Trunk], switched: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Callable[[], object]:
    def call() -> None:
        with switched():
            engine.score(trunks, Wants())

    return call


def profile(machine: Machine, record: Record) -> None:
    """Milliseconds of the ten largest kernels, and of the host, in one batch at 1.5B."""
    shape = SHAPES["15b"]
    engine = machine.engine(machine.model(shape, 1), machine.model(shape, 2))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for name in ("a: 8 x (128 + 8 x 128)", "d: 1 x (128 + 128)"):
        trunks = trunks_of(machine.lengths(BATCHES[name]), machine.shape(shape).vocab_size)
        engine.score(trunks, Wants())
        work = engine.prepare(trunks, Wants())
        with torch.profiler.profile(activities=activities) as found:
            work()
            machine.wait()
        events = found.key_averages()
        device = sorted(events, key=lambda e: -e.self_device_time_total)[:25]
        record(
            **{
                name: {
                    "device_ms": sum(e.self_device_time_total for e in events) / 1e3,
                    "host_ms": sum(e.self_cpu_time_total for e in events) / 1e3,
                    "kernels": [
                        {"name": e.key[:120], "calls": e.count, "ms": e.self_device_time_total / 1e3} for e in device
                    ],
                }
            }
        )
