"""Stage: the memory that batches need, and what the service predicted for them."""

import torch
from dense_reward.engines.torch.memory import peak_bytes
from dense_reward.records import Wants

from bench.gpu.machine import Machine, Record, trunks_of
from bench.speed.workload import SHAPES, Lengths

BATCHES: dict[str, Lengths] = {
    "8 x (128 + 8 x 128)": ((128, (128,) * 8),) * 8,
    "4 x (512 + 8 x 1024)": ((512, (1024,) * 8),) * 4,
    "8192 + 64 x 128": ((8192, (128,) * 64),),
    "1 x 16384": ((64, (16_384,)),),
}


def stage(machine: Machine, record: Record) -> None:
    """Fails if a batch needs more than predicted."""
    shape = machine.shape(SHAPES["15b"])
    engine = machine.engine(machine.model(shape, 1), machine.model(shape, 2))
    config = engine.models[0].transformers_model.config
    exceeded = []
    for name, lengths in BATCHES.items():
        trunks = trunks_of(machine.lengths(lengths), shape.vocab_size)
        tokens = sum(engine.cost(trunk).tokens for trunk in trunks)
        predicted = peak_bytes(config, tokens=tokens, itemsize=2, cuda=machine.device.type == "cuda")
        found: dict[str, float] = {"tokens": tokens, "predicted_mb": predicted / 1e6}
        for wants_name, wants in {
            "reward": Wants(),
            "kl, entropy, top 8": Wants(kl=True, entropy=True, top_k=8),
        }.items():
            extra = _extra_bytes(machine, lambda wants=wants: engine.score(trunks, wants))  # noqa: B023
            found[f"{wants_name}, mb"] = extra / 1e6
            if extra > predicted:
                exceeded.append(f"{name}, {wants_name}")
        record(**{name: found})
    if exceeded:
        raise SystemExit(f"more than predicted: {'; '.join(exceeded)}")


def _extra_bytes(machine: Machine, call: object) -> int:
    if machine.device.type != "cuda":
        call()  # type: ignore[operator]
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()  # type: ignore[operator]
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
